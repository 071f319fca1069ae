"""timm's VisionTransformer state dicts: our names already, but for the norm after average pooling."""

import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import timm
import torch
from timm.layers import GELU, GELUTanh, resample_abs_pos_embed
from timm.models import VisionTransformer, get_pretrained_cfg, is_model
from torch import Tensor, nn

from deepvit.errors import UserError
from deepvit.importers.dialect import Dialect, Row, Source, both
from deepvit.importers.locate import told_images
from deepvit.importers.settings import Grid

FRAME = [Row("cls_token", "cls_token"), Row("pos_embed", "pos_embed"),
         *(row for layer in ("patch_embed.proj", "norm", "head") for row in both(layer))]
BLOCK = [row for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
         for row in both(f"blocks.{{l}}.{layer}")]
AFTER_POOL = both("fc_norm", "norm")  # `norm` and `fc_norm` are one norm, before or after pooling: a file has either
LAYER_SCALE = Row("blocks.{l}.ls{b}.gamma", "blocks.{l}.ls{b}.gamma")
POOLS, GELUS = {"token": "cls", "avg": "avg"}, {"gelu": "erf", "gelu_tanh": "tanh"}  # timm's words -> ours
ROWS = [*FRAME, *BLOCK, LAYER_SCALE, *both("pre_logits.0"), *both("pre_logits.fc", "pre_logits.0")]


def _infer(source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    file = source.file
    named, arguments = named_model(file.said.get("arch") or ""), file.said.get("model_args") or {}
    if named:
        source.report.said = _images_of(file.said["arch"]) | source.report.said
    heads = arguments.get("num_heads") or (named.blocks[0].attn.num_heads if named else given.get("num_heads"))
    is_last = "fc_norm.weight" in file.shapes
    pool = given.get("pool", "avg" if is_last else "cls")
    return {"norm_eps": named.blocks[0].norm1.eps if named else 1e-6, "num_heads": heads,
            "img_size": arguments.get("img_size"), "final_norm": "after_pool" if is_last else "before_pool",
            "gelu": _told(source, "act_layer", "gelu", GELUS, given) or _gelu(source, named, given),
            "pool": _told(source, "global_pool", "pool", POOLS, given) or pool}


def _told(source: Source, keyword: str, setting: str, ours: Mapping[str, str], given: Mapping[str, Any]) -> str | None:
    """Our word for a keyword of timm's, None where the file does not tell it; UserError for what no ViT has here, or
    timm's word where ours is `given`."""
    value = (source.file.said.get("model_args") or {}).get(keyword)
    if value is not None and str(value) not in ours and setting not in given:
        raise UserError(f"{source} is of a model with {keyword}={value}, which ViT here lacks: take one with "
                        f"{' or '.join(ours)}, or give {setting}=... in its place.")
    return None if value is None else ours.get(str(value), str(value))


def _images_of(arch: str) -> dict[str, Any]:
    """How timm prepares images for a model of that name where it is told nothing else."""
    with suppress(RuntimeError):  # a tag that timm does not have
        if found := get_pretrained_cfg(arch):
            return told_images(found.to_dict())
    return {}


def _gelu(source: Source, named: VisionTransformer | None, given: Mapping[str, Any]) -> str:
    act = named.blocks[0].mlp.act if named else None
    if isinstance(act, (nn.GELU, GELU, GELUTanh)):
        is_tanh = isinstance(act, GELUTanh) or getattr(act, "approximate", "none") == "tanh"
        return "tanh" if is_tanh else "erf"
    if named and "gelu" not in given:
        raise UserError(f"{source} is of a model with {type(act).__name__}, which ViT here lacks: take one with GELU.")
    return type(act).__name__ if named else given.get("gelu", "erf")


@cache
def named_model(arch: str) -> VisionTransformer | None:
    """timm's model of that name, without storage; None if it is not a plain ViT: no other model is built."""
    name = arch.partition(".")[0]
    if not re.match(r"(vit|deit|deit3)_\w+_patch", name) or not is_model(name):
        return None
    with torch.device("meta"):
        model = timm.create_model(name)
    return model if isinstance(model, VisionTransformer) else None


def bicubic(pos: Tensor, old: Grid, new: Grid) -> Tensor:
    """timm's rule: antialiased bicubic, class row kept. pos `[1, 1 + old rows * columns, D]` -> `[1, 1 + new, D]`."""
    return resample_abs_pos_embed(pos, new_size=list(new), old_size=list(old), num_prefix_tokens=1)


TIMM = Dialect("timm",
               lambda file: {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "pos_embed"} <= file.shapes.keys(),
               lambda file, given: [*AFTER_POOL, *ROWS], _infer, bicubic)
