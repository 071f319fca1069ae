"""What this framework writes: its own names, with the model's settings as plain JSON beside them.

A checkpoint is `{"format": "deepvit", "version": 1, "model": ..., "ema": ..., "config": {...}, "classes": [...]}`;
a safetensors export holds the same (without tensors) as JSON in its metadata under `deepvit`.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import Size

from deepvit.errors import UserError
from deepvit.importers.dialect import Dialect, Told
from deepvit.importers.files import WeightsFile
from deepvit.importers.positions import bicubic
from deepvit.importers.table import Row

FORMAT, VERSION = "deepvit", 1

NORM, LINEAR = ("weight", "bias"), ("weight", "bias")
BATCH_NORM = (*NORM, "running_mean", "running_var", "num_batches_tracked")


def same(layer: str, names: Sequence[str]) -> list[Row]:
    """Rows of a layer that the other side names as we do."""
    return [Row(f"{layer}.{name}", f"{layer}.{name}") for name in names]


FRAME = [Row("cls_token", "cls_token"), Row("pos_embed", "pos_embed"), *same("patch_embed.proj", LINEAR),
         *same("norm", NORM), *same("head", LINEAR)]
BLOCK = [row for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
         for row in same(f"blocks.{{l}}.{layer}", LINEAR)]
LAYER_SCALE = [row for layer in ("ls1", "ls2") for row in same(f"blocks.{{l}}.{layer}", ["gamma"])]
CONV_STEM = [*same("patch_embed", ["conv1.weight", "conv2.weight"]),
             *same("patch_embed.bn1", BATCH_NORM), *same("patch_embed.bn2", BATCH_NORM)]
ROWS = [Row("{n}", "{n}")]


def _speaks(names: Set[str]) -> bool:
    return "cls_token" in names and any(".attn.mix." in name for name in names)


def is_ours(file: WeightsFile) -> bool:
    return file.said.get("format") == FORMAT


def _tells(file: WeightsFile, told: Mapping[str, Any], shapes: Mapping[str, Size], given: Mapping[str, Any]) -> Told:
    """The stored settings, once they agree with the tensors."""
    config, version = file.said.get("config"), file.said.get("version")
    if config is None and {"depth", "num_heads", "attention"} <= given.keys():
        return Told({})  # a bare state dict, for a model whose settings the caller has
    if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
        raise UserError(f"{file.path} holds our names without model settings ('config'): give a checkpoint of this "
                        f"framework, or load it into a model you have with load_weights.")
    if version != VERSION:
        raise UserError(f"{file.path} is a checkpoint of version {version!r}, this is deepvit for version {VERSION}.")
    for key in ("embed_dim", "depth"):  # sizes that would be built before shapes are compared
        if config.get(key) != told[key]:
            raise UserError(f"{file.path} says {key} {config.get(key)!r}, its tensors have {told[key]}: "
                            f"it is torn or forged.")
    if isinstance(attention := config.get("attention"), Mapping):  # older files have sync_norm, which was for training
        config = {**config, "attention": {key: value for key, value in attention.items() if key != "sync_norm"}}
    return Told({**config, "num_classes": told["num_classes"]})


DIALECT = Dialect("ours", _speaks, lambda file, given: ROWS, _tells, bicubic)
