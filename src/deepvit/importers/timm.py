"""timm's VisionTransformer state dicts: our names already, but for the norm after average pooling."""

import re
from collections.abc import Mapping, Set
from typing import Any

from torch import Size

from deepvit.errors import UserError
from deepvit.importers.dialect import Dialect, Told
from deepvit.importers.files import WeightsFile
from deepvit.importers.ours import BLOCK, FRAME, LAYER_SCALE, NORM, same
from deepvit.importers.positions import bicubic
from deepvit.importers.settings import head_width
from deepvit.importers.table import Row

AFTER_POOL = [Row(f"fc_norm.{name}", f"norm.{name}") for name in NORM]
ROWS = [*FRAME, *BLOCK, *LAYER_SCALE, *same("pre_logits.0", ("weight", "bias")),
        *(Row(f"pre_logits.fc.{name}", f"pre_logits.0.{name}") for name in ("weight", "bias"))]
HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16}  # of timm's vit_<size>_patch... names


def _speaks(names: Set[str]) -> bool:
    return {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "pos_embed"} <= names


def _rows(file: WeightsFile, given: Mapping[str, Any]) -> list[Row]:
    """`norm` and `fc_norm` are one norm, before or after pooling: a file has either."""
    return [*AFTER_POOL, *ROWS]


def _tells(file: WeightsFile, told: Mapping[str, Any], shapes: Mapping[str, Size], given: Mapping[str, Any]) -> Told:
    size = re.match(r"(?:vit|deit|deit3)_([a-z]+)_patch", file.said.get("arch") or "")
    heads = given.get("num_heads") or HEADS.get(size[1] if size else "")
    if heads is None:
        raise UserError(f"{file.path} does not tell its number of heads: give num_heads=... (timm's tiny, small, base, "
                        f"large, huge have {', '.join(map(str, HEADS.values()))}; this one has width "
                        f"{told['embed_dim']}).")
    averaged = "fc_norm.weight" in file.shapes
    return Told({"gelu": "erf", "norm_eps": 1e-6, "num_heads": heads, **head_width(shapes, heads),
                 "pool": "avg" if averaged else "cls", "final_norm": "after_pool" if averaged else "before_pool"})


DIALECT = Dialect("timm", _speaks, _rows, _tells, bicubic)
