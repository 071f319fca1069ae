"""timm's VisionTransformer state dicts: our names already, but for the norm after average pooling."""

import re
from collections.abc import Mapping, Set
from functools import cache
from typing import Any

import timm
import torch
from timm.layers import GELU, GELUTanh
from timm.models import VisionTransformer, is_model
from torch import Size, nn

from deepvit.errors import Untold, UserError
from deepvit.importers.dialect import Dialect, Told
from deepvit.importers.files import WeightsFile
from deepvit.importers.ours import BLOCK, FRAME, LAYER_SCALE, same
from deepvit.importers.positions import bicubic
from deepvit.importers.table import Row, both
from deepvit.models import list_models, model_config

AFTER_POOL = both("fc_norm", "norm")
ROWS = [*FRAME, *BLOCK, *LAYER_SCALE, *same("pre_logits.0", ("weight", "bias")),
        *both("pre_logits.fc", "pre_logits.0")]
SIZES = {192: "tiny has 3", 384: "small has 6", 768: "base has 12", 1024: "large has 16", 1280: "huge has 16"}


def _speaks(names: Set[str]) -> bool:
    return {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "pos_embed"} <= names


def _rows(file: WeightsFile, given: Mapping[str, Any]) -> list[Row]:
    """`norm` and `fc_norm` are one norm, before or after pooling: a file has either."""
    return [*AFTER_POOL, *ROWS]


def _tells(file: WeightsFile, told: Mapping[str, Any], shapes: Mapping[str, Size], given: Mapping[str, Any]) -> Told:
    named, arguments = named_model(file.said.get("arch") or ""), file.said.get("model_args") or {}
    heads = arguments.get("num_heads") or (named.blocks[0].attn.num_heads if named else given.get("num_heads"))
    if heads is None:
        raise Untold(f"{file.path} does not tell its number of heads: give num_heads=..., or arch=NAME of timm's or "
                     f"of deepvit's models{_readings(told['embed_dim'])}.")
    averaged, eps = "fc_norm.weight" in file.shapes, named.blocks[0].norm1.eps if named else 1e-6
    return Told({"gelu": _gelu(file, named), "norm_eps": eps, "num_heads": heads, "pool": "avg" if averaged else "cls",
                 "final_norm": "after_pool" if averaged else "before_pool"})


@cache
def named_model(arch: str) -> VisionTransformer | None:
    """timm's model of that name, without storage; None for what is no plain ViT of timm's.

    Of what a file says only the name is used, and only of models that are ViTs by their name.
    """
    name = arch.partition(".")[0]
    if not re.match(r"(vit|deit|deit3)_\w+_patch", name) or not is_model(name):
        return None
    with torch.device("meta"):
        model = timm.create_model(name)
    return model if isinstance(model, VisionTransformer) else None


def _gelu(file: WeightsFile, named: VisionTransformer | None) -> str:
    act = named.blocks[0].mlp.act if named else None
    if act is not None and not isinstance(act, (nn.GELU, GELU)):
        raise UserError(f"{file.path} is of a model with {type(act).__name__}, which no model here has: take one with "
                        f"GELU.")
    return "tanh" if getattr(act, "approximate", "none") == "tanh" or isinstance(act, GELUTanh) else "erf"


def _readings(width: int) -> str:
    """The models known here that are so wide, and their heads."""
    known = [f"timm's {SIZES[width]}"] if width in SIZES else []
    ours = sorted({(model["num_heads"], name) for name in list_models() if (model := model_config(name))["embed_dim"]
                   == width and model["attention"]["class"] == "SelfAttention"})
    known += [f"{name} has {heads}" for heads, name in ours]
    return f" (of width {width}: {', '.join(known)})" if known else f" (its width is {width})"


DIALECT = Dialect("timm", _speaks, _rows, _tells, bicubic)
