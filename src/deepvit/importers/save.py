"""`save_model`: any model of ours, however it was trained, as a file that tells all that `load_model` needs."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.utils import unwrap_model
from torch import Tensor, nn

from deepvit.errors import UserError, reason
from deepvit.importers.ours import FORMAT, VERSION
from deepvit.importers.settings import empty_model
from deepvit.models import ViT

SUFFIXES = (".safetensors", ".pt", ".pth")
ORIGIN = ("classes", "class_names", "run")  # of the head, told by the file that it came from


def save_model(model: nn.Module, path: str | Path, classes: Sequence[str] | None = None) -> None:
    """Writes a model's weights with its settings; `deepvit.load_model(path)` reads the same model back.

    Args:
        model: of `deepvit.create_model` or `timm.create_model`, also within DistributedDataParallel or torch.compile.
        path: `*.safetensors` (settings in the metadata), `*.pt` or `*.pth`; a file that is there is replaced whole.
        classes: names in the order of the logits; None: those that came with the head from a file, if any.
    Raises:
        UserError: another kind of model, one whose layers were changed by hand, a path that cannot be written.
    """
    write(Path(path), described(unwrap_model(model), classes))


def write(path: Path, content: dict[str, Any]) -> None:
    """A file of `described`'s content, which may have more to tell in plain JSON."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"Models are written as {', '.join(SUFFIXES)}, and {path} is none: choose another name.")
    aside = path.with_name(path.name + ".tmp")
    try:
        if path.suffix == ".safetensors":
            save_tensors(aside, content.pop("model"), {"deepvit": json.dumps(content)})
        else:
            torch.save(content, aside)
        os.replace(aside, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({reason(error)}): choose another path.") from None


def described(model: nn.Module, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """The content of a checkpoint of ours: the weights as `model`, and all else as plain JSON."""
    if not isinstance(model, ViT) or not hasattr(model, "config"):
        raise UserError(f"save_model writes models of deepvit.create_model, not a {type(model).__name__}.")
    if classes is not None and len(classes) != model.num_classes:
        raise UserError(f"{len(classes)} classes are given, the model has {model.num_classes}: give a name for each.")
    state = model.state_dict()
    _check_settings(model, state)
    report = getattr(model, "load_report", None)
    said = report.said if report and classes is None and report.head is model.head else {"classes": classes}
    return {"format": FORMAT, "version": VERSION, "config": model.config, "model": state,
            **{key: said[key] for key in ORIGIN if said.get(key) is not None}}


def _check_settings(model: ViT, state: Mapping[str, Tensor]) -> None:
    built = empty_model(model.config, "The model").state_dict()
    wrong = next((name for name in {**state, **built} if name not in state or name not in built
                  or state[name].shape != built[name].shape), None)
    if wrong:
        raise UserError(f"The model's '{wrong}' is not what its config makes, so it could not be loaded again: change "
                        f"models by their settings (reset_classifier for the head).")


def save_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file with the mode that the umask gives (the library's own is readable to its owner alone)."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path,
              metadata={"format": "pt", **(metadata or {})})
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
