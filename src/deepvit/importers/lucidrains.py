"""lucidrains/vit-pytorch `vit_pytorch.deepvit.DeepViT`: one model, three generations of names."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import Size

from deepvit.importers.deepvit_flax import assumptions, in_channels, unflatten
from deepvit.importers.dialect import Dialect, Told
from deepvit.importers.files import WeightsFile
from deepvit.importers.positions import first_rows
from deepvit.importers.table import TRANSPOSE, Row, Rule, both
from deepvit.models import attention_config


def _block(attention: str, norm1: str, norm2: str, fc1: str, fc2: str) -> list[Row]:
    layer = "transformer.layers.{l}"
    return [
        *both(f"{layer}.{norm1}", "blocks.{l}.norm1"),
        Row(f"{layer}.{attention}.to_qkv.weight", "blocks.{l}.attn.qkv.weight"),
        Row(f"{layer}.{attention}.reattn_weights", "blocks.{l}.attn.mix.weight", TRANSPOSE),  # [source, new]
        *both(f"{layer}.{attention}.reattn_norm.1", "blocks.{l}.attn.norm"),
        *both(f"{layer}.{attention}.to_out.0", "blocks.{l}.attn.proj"),
        *both(f"{layer}.{norm2}", "blocks.{l}.norm2"),
        *both(f"{layer}.{fc1}", "blocks.{l}.mlp.fc1"),
        *both(f"{layer}.{fc2}", "blocks.{l}.mlp.fc2"),
    ]


CURRENT = _block("0", "0.norm", "1.net.0", "1.net.1", "1.net.4")  # since 1.4.4
WRAPPED = _block("0.fn.fn", "0.fn.norm", "1.fn.norm", "1.fn.fn.net.0", "1.fn.fn.net.3")  # before
FRAME = [Row("cls_token", "cls_token"), Row("pos_embedding", "pos_embed"),
         *both("mlp_head.0", "norm"), *both("mlp_head.1", "head")]


def _patch(file: WeightsFile, given: Mapping[str, Any]) -> list[Row]:
    """The patch projection; since 1.0.0 as layer 2, between two LayerNorms."""
    normed = "to_patch_embedding.2.weight" in file.shapes
    linear = "to_patch_embedding.2" if normed else "to_patch_embedding.1"
    patch_dim, positions = (file.shapes.get(f"{linear}.weight") or (0,))[-1], file.shapes.get("pos_embedding", ())
    channels, side = in_channels(patch_dim, positions, given, str(file.path))
    project = [Row(f"{linear}.weight", "patch_embed.proj.weight", unflatten(channels, side)),
               Row(f"{linear}.bias", "patch_embed.proj.bias")]
    if not normed:
        return project
    reorder = Rule(lambda norm: norm.view(side, side, channels).permute(2, 0, 1).reshape(-1))  # (channel, row, column)
    return [*both("to_patch_embedding.1", "patch_embed.norm_in", reorder), *project,
            *both("to_patch_embedding.3", "patch_embed.norm_out")]


def _rows(file: WeightsFile, given: Mapping[str, Any]) -> Sequence[Row]:
    wrapped = "transformer.layers.0.0.fn.fn.reattn_weights" in file.shapes
    return [*FRAME, *_patch(file, given), *(WRAPPED if wrapped else CURRENT)]


def _speaks(names: Set[str]) -> bool:
    return ("transformer.layers.0.0.reattn_weights" in names
            or "transformer.layers.0.0.fn.fn.reattn_weights" in names)


def _tells(file: WeightsFile, told: Mapping[str, Any], shapes: Mapping[str, Size], given: Mapping[str, Any]) -> Told:
    return Told({"gelu": "erf", "norm_eps": 1e-5, "attention": attention_config("reattention_ln"), "pool": "cls",
                 "final_norm": "after_pool"}, assumptions(told, shapes, given))


DIALECT = Dialect("lucidrains", _speaks, _rows, _tells, first_rows, square_only=True)
