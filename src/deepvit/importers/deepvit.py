"""The published DeepViT checkpoints (zhoudaquan/dvit_repo): our layout but for the names of the mix and its norm."""

from collections.abc import Mapping
from typing import Any

import torch

from deepvit.importers.dialect import Dialect, Row, Rule, Source
from deepvit.importers.files import WeightsFile
from deepvit.importers.timm import BLOCK, FRAME, bicubic
from deepvit.models import ViT, build_model, model_config

CONV1X1 = Rule(lambda kernel: kernel[:, :, 0, 0], lambda theta: theta[:, :, None, None])  # [H, H, 1, 1] <-> [H, H]
ROWS = [
    *FRAME, *BLOCK, *(Row(name, name) for name in ("patch_embed.conv{l}.weight", "patch_embed.bn{l}.{n}")),
    Row("blocks.{l}.attn.reatten_matrix.weight", "blocks.{l}.attn.mix.weight", CONV1X1),
    Row("blocks.{l}.attn.reatten_matrix.bias", "blocks.{l}.attn.mix.bias"),
    Row("blocks.{l}.attn.var_norm.{n}", "blocks.{l}.attn.norm.{n}"),
]

# `arch` in a published checkpoint -> the model of conf/model
ARCHS = {"deepvit_patch16_224_re_attn_16b": "deepvit16", "deepvit_patch16_224_re_attn_24b": "deepvit24",
         "deepvit_patch16_224_re_attn_32b": "deepvit32", "deepvit_S": "deepvit_s", "deepvit_L": "deepvit_l",
         "deepvit_L_384": "deepvit_l_384"}
NAMED = (*ARCHS.values(), "vit16", "vit24", "vit32")
SHAPED = ("embed_dim", "depth", "stem", "patch_size")  # what must agree for a file to be a named model


def is_named(name: str, model: ViT) -> bool:
    """Whether the named model, made for as many classes, loads the weights strictly and computes the same."""
    if _differences(name, model.config):
        return False
    with torch.device("meta"):
        named = build_model(model_config(name) | {"num_classes": model.num_classes})
    return _arithmetic(named) == _arithmetic(model)


def _arithmetic(model: ViT) -> tuple:
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    scalars = [(block.attn.num_heads, block.attn.scale, block.attn.map_scale, block.residual_scale)
               for block in model.blocks]
    return model.grid_size, shapes, scalars


def _differences(name: str, settings: Mapping[str, Any]) -> list[str]:
    model = model_config(name)
    return [key for key in SHAPED if model[key] != settings.get(key)]


def _matches(file: WeightsFile) -> bool:
    """A plain ViT of that code has timm's names, and is recognised by its arch alone."""
    names = file.shapes.keys()
    return file.said.get("arch") in ARCHS or {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight"} <= names and (
        any(".reatten_matrix." in name for name in names) or "patch_embed.conv1.weight" in names)


def _infer(source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    """H and scales: by `arch`, else by the named model of these shapes, else as all published patch stems have them."""
    arch, shaped = source.file.said.get("arch"), source.settings
    named = ARCHS.get(arch) or next((name for name in NAMED if not _differences(name, shaped)), None)
    settings = {"norm_eps": 1e-6, "gelu": "erf"}
    if named is None:
        return settings | ({"residual_scale": 1.0, "map_scale": 1.0} if shaped["stem"] == "patch" else {})
    model = model_config(named)
    if differences := _differences(named, shaped):
        said, held = (", ".join(f"{key} {one[key]}" for key in differences) for one in (model, shaped))
        source.report.notes.append(f"its arch '{arch}' has {said}; the tensors have {held}, and they are what is built")
    elif arch in ARCHS:
        settings["img_size"] = model["img_size"]
    known = shaped.get("num_heads") or (model["num_heads"] if arch in ARCHS else None)
    heads = known or given.get("num_heads") or model["num_heads"]
    map_scale = model["map_scale"]
    if map_scale != 1.0 and differences:
        map_scale = (shaped["embed_dim"] / heads) ** -0.5  # the published rule, for another width
    return settings | {"num_heads": heads, "residual_scale": model["residual_scale"], "map_scale": map_scale}


DEEPVIT = Dialect("deepvit", _matches, lambda file, given: ROWS, _infer, bicubic)
