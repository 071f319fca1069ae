"""What this framework writes: its own names, with the model's settings as plain JSON beside them.

A checkpoint is `{"format": "deepvit", "version": 1, "model": ..., "ema": ..., "config": {...}, "classes": [...]}`;
a safetensors export holds the same (without tensors) as JSON in its metadata under `deepvit`.
"""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import Size

from deepvit.errors import Untold, UserError
from deepvit.importers.dialect import Dialect, Told
from deepvit.importers.files import WeightsFile
from deepvit.importers.positions import bicubic, grid_of
from deepvit.importers.settings import PER_HEAD, settings_from_config
from deepvit.importers.table import Row
from deepvit.models import list_models, model_config

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
    return "cls_token" in names and any(name.endswith(tuple(f".attn.{part}" for part in PER_HEAD)) for name in names)


def is_ours(file: WeightsFile) -> bool:
    """Whether the file says so: by its format, its settings, or one of our models' names."""
    config = file.said.get("config")
    named = file.said.get("arch") in list_models() and "blocks.0.attn.qkv.weight" in file.shapes
    return (file.said.get("format") == FORMAT or isinstance(config, Mapping) and {"embed_dim", "attention"} <= {*config}
            or named and not any(".reatten_matrix." in name for name in file.shapes))


def _tells(file: WeightsFile, told: Mapping[str, Any], shapes: Mapping[str, Size], given: Mapping[str, Any]) -> Told:
    """The stored settings, once they agree with the tensors; without any, those of the model that is named."""
    config, version = file.said.get("config"), file.said.get("version", VERSION)
    if config is None:
        return _without_config(file, told, given)
    if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
        raise UserError(f"{file.path} holds model settings ('config') that are no mapping: it is torn or forged.")
    if version != VERSION:
        raise UserError(f"{file.path} is a checkpoint of version {version!r}, this is deepvit for version {VERSION}.")
    if not _fits(config.get("img_size"), told["patch_size"], shapes["pos_embed"][1] - 1):
        raise UserError(f"{file.path} says img_size {config.get('img_size')}, which its positions "
                        f"{tuple(shapes['pos_embed'])} do not fit: it is torn or forged.")
    _check_sizes(file, config, told)
    if isinstance(attention := config.get("attention"), Mapping):  # older files have sync_norm, which was for training
        config = {**config, "attention": {key: value for key, value in attention.items() if key != "sync_norm"}}
    return Told({**config, "num_classes": told["num_classes"]})


def _check_sizes(file: WeightsFile, config: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Sizes that would be built before shapes are compared."""
    for key in ("embed_dim", "depth"):
        if config.get(key) != told[key]:
            raise UserError(f"{file.path} says {key} {config.get(key)!r}, its tensors have {told[key]}: "
                            f"it is torn or forged.")


def _fits(img_size: Any, patch_size: Any, count: int) -> bool:
    try:
        return math.prod(grid_of(img_size, patch_size)) == count
    except UserError:
        return False


def _without_config(file: WeightsFile, told: Mapping[str, Any], given: Mapping[str, Any]) -> Told:
    """Settings of weights that another trainer saved: of the model that `arch` names (with the keywords that timm's
    train.py stored), as far as the tensors agree; or those given."""
    arch = file.said.get("arch")
    if arch not in list_models():
        return _given(file, told, given)
    keywords = _keywords_of_timm(file)
    _check_sizes(file, told | keywords, told)
    base = model_config(arch) | keywords
    named = settings_from_config(base, str(file.path))
    other = [key for key in told if named.get(key) != told[key] and key != "num_classes"]
    settings = {key: value for key, value in base.items() if key not in other and key != "num_classes"}
    note = f"its arch '{arch}' is taken with the tensors' {', '.join(f'{key}={told[key]}' for key in other)}"
    return Told(settings, [note] if other else [])


def _given(file: WeightsFile, told: Mapping[str, Any], given: Mapping[str, Any]) -> Told:
    """Nothing, once the caller has told what tensors do not tell."""
    if not given.keys() - (told.keys() - {"attention", "depth"}) - {"img_size", "num_classes"}:
        raise Untold(f"{file.path} holds our names without model settings ('config'): say which model it is with "
                     f"arch=NAME (such as deepvit16) or by its settings (attention=..., map_scale=...), or load it "
                     f"into a model you have with load_weights.")
    if told["stem"] == "conv" and not {"residual_scale", "map_scale"} <= given.keys():
        raise Untold(f"{file.path} has a conv stem and does not tell residual_scale and map_scale: give them, or "
                     f"arch=NAME (such as deepvit_s).")
    return Told({})


def _keywords_of_timm(file: WeightsFile) -> dict[str, Any]:
    """Keywords of `ViT` that were given to `timm.create_model`, in our words."""
    keywords = dict(file.said.get("model_args") or {})
    pool = keywords.pop("global_pool", None)
    return keywords | ({"pool": "cls" if pool == "token" else pool} if pool else {})


DIALECT = Dialect("ours", _speaks, lambda file, given: ROWS, _tells, bicubic)
