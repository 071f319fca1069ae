"""The published DeepViT checkpoints (zhoudaquan/dvit_repo): our layout but for the names of the mix and its norm."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, nn

from deepvit.errors import Untold
from deepvit.importers.dialect import Dialect, Told
from deepvit.importers.files import WeightsFile
from deepvit.importers.ours import BATCH_NORM, BLOCK, CONV_STEM, FRAME
from deepvit.importers.positions import bicubic
from deepvit.importers.table import Row, Rule
from deepvit.models import ViT, build_model, model_config

CONV1X1 = Rule(lambda kernel: kernel[:, :, 0, 0], lambda theta: theta[:, :, None, None])  # [H, H, 1, 1] <-> [H, H]

ROWS = [
    *FRAME, *CONV_STEM, *BLOCK,
    Row("blocks.{l}.attn.reatten_matrix.weight", "blocks.{l}.attn.mix.weight", CONV1X1),
    Row("blocks.{l}.attn.reatten_matrix.bias", "blocks.{l}.attn.mix.bias"),
    *(Row(f"blocks.{{l}}.attn.var_norm.{name}", f"blocks.{{l}}.attn.norm.{name}") for name in BATCH_NORM),
]

# `arch` in a published checkpoint -> the model of conf/model
ARCHS = {"deepvit_patch16_224_re_attn_16b": "deepvit16", "deepvit_patch16_224_re_attn_24b": "deepvit24",
         "deepvit_patch16_224_re_attn_32b": "deepvit32", "deepvit_S": "deepvit_s", "deepvit_L": "deepvit_l",
         "deepvit_L_384": "deepvit_l_384"}
NAMED = (*ARCHS.values(), "vit16", "vit24", "vit32")
SHAPED = ("embed_dim", "depth", "stem", "patch_size")  # what must agree for a file to be a named model


def _speaks(names) -> bool:
    return ("blocks.0.attn.qkv.weight" in names and "patch_embed.proj.weight" in names
            and (any(".reatten_matrix." in name for name in names) or "patch_embed.conv1.weight" in names))


def _tells(file: WeightsFile, told: Mapping[str, Any], shapes: Mapping[str, Size], given: Mapping[str, Any]) -> Told:
    """H without a mix, residual and map scale: by `arch`, else by the named model of these shapes."""
    arch, notes = file.said.get("arch"), []
    named = ARCHS.get(arch) or next((name for name in NAMED if not _differences(name, told)), None)
    rest = {"norm_eps": 1e-6, "gelu": "erf"}
    if named is None:
        return Told(rest | _unnamed(file, told, given), notes)
    model = model_config(named)
    if differences := _differences(named, told):
        notes.append(f"its arch '{arch}' has " + ", ".join(f"{key} {model[key]}" for key in differences)
                     + "; the tensors have " + ", ".join(f"{key} {told.get(key)}" for key in differences)
                     + ", and they are what is built")
    known = told.get("num_heads") or (model["num_heads"] if arch in ARCHS else None)
    heads = known or given.get("num_heads") or model["num_heads"]
    rest |= {"num_heads": heads, "residual_scale": model["residual_scale"]}
    if arch in ARCHS and not differences:
        rest["img_size"] = model["img_size"]
    map_scale = model["map_scale"]
    if map_scale != 1.0 and differences:
        map_scale = (told["embed_dim"] / heads) ** -0.5  # the published rule, for another width
    return Told(rest | {"map_scale": map_scale}, notes)


def _unnamed(file: WeightsFile, told: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a file that names no model: the caller's, or those common to every published model of its stem."""
    if told["stem"] == "patch":
        return {"residual_scale": 1.0, "map_scale": 1.0}
    if absent := [key for key in ("residual_scale", "map_scale") if key not in given]:
        raise Untold(f"{file.path} has a conv stem and names no published model, so it does not tell "
                     f"{' and '.join(absent)}: give them (published: residual_scale=0.5, map_scale=1.0 in L and "
                     f"head_dim**-0.5 in S).")
    return {}


def is_named(name: str, model: ViT) -> bool:
    """Whether the named model of conf/model, made for as many classes, loads the weights strictly and computes the
    same."""
    if _differences(name, model.config):
        return False
    with torch.device("meta"):
        named = build_model(model_config(name) | {"num_classes": model.num_classes})
    return (named.grid_size == model.grid_size and _shapes(named) == _shapes(model)
            and all(_scalars(a) == _scalars(b) for a, b in zip(named.blocks, model.blocks, strict=True)))


def _shapes(model: ViT) -> dict[str, Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _scalars(block: nn.Module) -> tuple[float, ...]:
    attention = block.attn
    return attention.num_heads, attention.scale, attention.map_scale, block.residual_scale


def _differences(name: str, told: Mapping[str, Any]) -> list[str]:
    model = model_config(name)
    return [key for key in SHAPED if model[key] != told.get(key)]


DIALECT = Dialect("deepvit", _speaks, lambda file, given: ROWS, _tells, bicubic)
