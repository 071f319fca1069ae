"""What this framework writes: our own names, with the model's settings as plain JSON beside them. A checkpoint is
`{"format": "deepvit", "version": 1, "model": ..., "ema": ..., "config": {...}, "classes": [...]}`; a safetensors export
holds the same (without tensors) as JSON in its metadata under `deepvit`."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.utils import unwrap_model
from torch import Tensor, nn

from deepvit.errors import Untold, UserError, reason
from deepvit.importers.dialect import Dialect, Row, Source
from deepvit.importers.files import WeightsFile
from deepvit.importers.locate import IMAGES
from deepvit.importers.settings import PER_HEAD, empty_model, grid_of, settings_from_config
from deepvit.importers.timm import bicubic
from deepvit.models import ViT, list_models, model_config

FORMAT, VERSION = "deepvit", 1
SUFFIXES = (".safetensors", ".pt", ".pth")
ORIGIN = ("classes", "class_names", "run")  # of the head, from the file that it came from


def save_model(model: nn.Module, path: str | Path, classes: Sequence[str] | None = None) -> None:
    """Writes a model's weights with its settings; `deepvit.load_model(path)` reads the same model back.

    The model is one of `deepvit.create_model` or `timm.create_model`, also within DistributedDataParallel or
    torch.compile; `path` is `*.safetensors` (settings in the metadata), `*.pt` or `*.pth`, and an existing file is
    replaced whole; `classes` are names in the order of the logits (default: those that came with the head from a file).
    Raises UserError for another kind of model, one whose layers were changed by hand, or a path that cannot be written.
    """
    write(Path(path), described(unwrap_model(model), classes))


def write(path: Path, content: dict[str, Any]) -> None:
    """A file of `described`'s content, which may have more to tell in plain JSON."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"Models are written as {', '.join(SUFFIXES)}, not {path}: choose another name.")
    aside = path.with_name(path.name + ".tmp")
    try:
        if path.suffix == ".safetensors":
            save_tensors(aside, content.pop("model"), {"deepvit": json.dumps(content)})
        else:
            with aside.open("wb") as file:  # by its path torch would not say why it cannot be written
                torch.save(content, file)
        os.replace(aside, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        with suppress(OSError):
            aside.unlink()
        raise UserError(f"{path} cannot be written ({reason(error)}): choose another path.") from None


def described(model: nn.Module, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """The content of a checkpoint of ours: the weights as `model`, and all else as plain JSON."""
    if not isinstance(model, ViT):
        raise UserError(f"save_model writes models of deepvit.create_model, not a {type(model).__name__}.")
    if classes is not None and len(classes) != model.num_classes:
        raise UserError(f"{len(classes)} classes are given, the model has {model.num_classes}: give a name for each.")
    state = model.state_dict()
    built = empty_model(model.config, "The model").state_dict()
    if wrong := next((name for name in {**state, **built} if name not in state or name not in built
                      or state[name].shape != built[name].shape), None):
        raise UserError(f"The model's '{wrong}' does not fit its config: use settings, or reset_classifier for a head.")
    return {"format": FORMAT, "version": VERSION, "config": model.config, "model": state, **origin_of(model, classes)}


def origin_of(model: ViT, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """What the file that the model came from tells of its head, unless that is another now, and of its images."""
    report = getattr(model, "load_report", None)
    told = report.said if report else {}
    said = told if report and classes is None and report.head is model.head else {"classes": classes}
    said = {key: said.get(key) for key in ORIGIN} | {key: told.get(key) for key in IMAGES}
    return {key: value for key, value in said.items() if value is not None}


def save_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file with the mode that the umask gives (the library's own is readable to its owner alone)."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path,
              metadata={"format": "pt", **(metadata or {})})
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _matches(file: WeightsFile) -> bool:
    """By the file's format, its settings, the name of one of our models, or parameters that only ours have."""
    config, names = file.said.get("config"), file.shapes.keys()
    named = file.said.get("arch") in list_models() and "blocks.0.attn.qkv.weight" in names
    return (file.said.get("format") == FORMAT or isinstance(config, Mapping) and {"embed_dim", "attention"} <= {*config}
            or named and not any(".reatten_matrix." in name for name in names) or "cls_token" in names
            and any(name.endswith(tuple(f".attn.{part}" for part in PER_HEAD)) for name in names))


def _infer(source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    """The stored settings, once they agree with the tensors; without any, those of the model that `arch` names."""
    said, shaped = source.file.said, source.settings
    config, version = said.get("config"), said.get("version", VERSION)
    if config is None:
        return _infer_named(source) if said.get("arch") in list_models() else _check_given(source, given)
    if not isinstance(config, Mapping):
        raise UserError(f"{source} holds model settings ('config') that are not a mapping: it is torn or forged.")
    if version != VERSION:
        raise UserError(f"{source} is a checkpoint of version {version!r}, this is deepvit for version {VERSION}.")
    positions = source.steps["pos_embed"].shape
    try:
        count = math.prod(grid_of(config.get("img_size"), shaped["patch_size"]))
    except UserError:
        count = None
    if count != positions[1] - 1:
        raise UserError(f"{source} says img_size {config.get('img_size')}, unlike its positions: it is torn or forged.")
    _check_sizes(source, config)
    if isinstance(attention := config.get("attention"), Mapping):  # older files have sync_norm, which was for training
        config = {**config, "attention": {key: value for key, value in attention.items() if key != "sync_norm"}}
    shaped.setdefault("num_heads", config.get("num_heads"))
    return {**config, "num_classes": shaped["num_classes"]}


def _check_sizes(source: Source, config: Mapping[str, Any]) -> None:
    """Sizes that decide how much is built before shapes are compared."""
    for key in ("embed_dim", "depth"):
        if (said := config.get(key)) != source.settings[key]:
            raise UserError(f"{source} says {key} {said!r}, its tensors {source.settings[key]}: it is torn or forged.")


def _infer_named(source: Source) -> dict[str, Any]:
    """Settings of weights that another trainer saved: of the model that `arch` names, with the keywords that timm's
    train.py stored, as far as the tensors agree."""
    arch, keywords = source.file.said["arch"], dict(source.file.said.get("model_args") or {})
    if pool := keywords.pop("global_pool", None):
        keywords["pool"] = "cls" if pool == "token" else pool
    _check_sizes(source, source.settings | keywords)
    base = model_config(arch) | keywords
    named = settings_from_config(base | {"num_classes": source.settings["num_classes"]}, str(source))
    other = {key: value for key, value in source.settings.items() if named.get(key) != value}
    if other:
        sizes = ", ".join(f"{key}={value}" for key, value in other.items())
        source.report.notes.append(f"its arch '{arch}' is taken with the tensors' {sizes}")
    return {key: value for key, value in base.items() if key not in {*other, "num_classes"}}


def _check_given(source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing to infer; refuses to guess unless the caller gave what the tensors leave open."""
    if not given.keys() - (source.settings.keys() - {"attention", "depth"}) - {"img_size", "num_classes"}:
        raise Untold(f"{source} holds our names without settings ('config'): give arch=NAME (such as deepvit16) or "
                     f"settings (attention=..., map_scale=...), or load it into a model you have with load_weights.")
    return {}


OURS = Dialect("ours", _matches, lambda file, given: [Row("{n}", "{n}")], _infer, bicubic)
