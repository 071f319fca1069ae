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
from deepvit.importers.table import Row
from deepvit.models import list_models, model_config

AFTER_POOL = [Row(f"fc_norm.{name}", f"norm.{name}") for name in NORM]
ROWS = [*FRAME, *BLOCK, *LAYER_SCALE, *same("pre_logits.0", ("weight", "bias")),
        *(Row(f"pre_logits.fc.{name}", f"pre_logits.0.{name}") for name in ("weight", "bias"))]
HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16}  # of timm's vit_<size>_patch... names
WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024, "huge": 1280}


def _speaks(names: Set[str]) -> bool:
    return {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "pos_embed"} <= names


def _rows(file: WeightsFile, given: Mapping[str, Any]) -> list[Row]:
    """`norm` and `fc_norm` are one norm, before or after pooling: a file has either."""
    return [*AFTER_POOL, *ROWS]


def _tells(file: WeightsFile, told: Mapping[str, Any], shapes: Mapping[str, Size], given: Mapping[str, Any]) -> Told:
    heads = heads_of(file.said.get("arch") or "") or given.get("num_heads")
    if heads is None:
        raise UserError(f"{file.path} does not tell its number of heads: give num_heads=..., or arch=NAME of timm's or "
                        f"of deepvit's models{_readings(told['embed_dim'])}.")
    averaged = "fc_norm.weight" in file.shapes
    return Told({"gelu": "erf", "norm_eps": 1e-6, "num_heads": heads, "pool": "avg" if averaged else "cls",
                 "final_norm": "after_pool" if averaged else "before_pool"})


def heads_of(arch: str) -> int | None:
    """H of a model of timm by its name, where that tells."""
    size = re.match(r"(?:vit|deit|deit3)_([a-z]+)_patch", arch)
    return HEADS.get(size[1]) if size else None


def _readings(width: int) -> str:
    """The models known here that are so wide, and their heads."""
    known = [f"timm's {size} has {HEADS[size]}" for size in WIDTHS if WIDTHS[size] == width]
    ours = sorted({(model["num_heads"], name) for name in list_models() if (model := model_config(name))["embed_dim"]
                   == width and model["attention"]["class"] == "SelfAttention"})
    known += [f"{name} has {heads}" for heads, name in ours]
    return f" (of width {width}: {', '.join(known)})" if known else f" (its width is {width})"


DIALECT = Dialect("timm", _speaks, _rows, _tells, bicubic)
