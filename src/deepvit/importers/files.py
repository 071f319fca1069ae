"""Weights files opened without trust: names and shapes first, one tensor at a time after, never a pickle executed."""

import argparse
import json
import pickle
import pickletools
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepvit.errors import UserError, reason
from deepvit.importers import msgpack, npz
from deepvit.importers.hub import located

# Where trainers keep the weights in a checkpoint, and where in a folder
RAW, EMA = ("state_dict", "model", "model_state_dict", "net"), ("state_dict_ema", "ema", "model_ema")
RUN_FILES, FOLDER_FILES = ("best.pt", "last.pt"), ("model.safetensors", "pytorch_model.bin")
WRAPPERS = re.compile(r"(?:(?:module|_orig_mod|model|net)\.)*")  # DistributedDataParallel, torch.compile, Lightning


@dataclass
class WeightsFile:
    """A file's tensors by name.

    `shapes` is known at once, `read(name)` fetches one tensor (on the CPU, maybe a view of the file);
    `said` is what the file tells besides tensors: `arch`, `model_args`, `config`, `classes`, `format`, ...
    """

    path: Path
    kind: str  # torch | safetensors | npz | msgpack
    shapes: dict[str, torch.Size]
    read: Callable[[str], Tensor]
    said: dict[str, Any] = field(default_factory=dict)
    has_ema: bool = False


def open_weights(path: str | Path, ema: bool = False) -> WeightsFile:
    """Opens a weights file of any known format, told by its content.

    Args:
        path: the file; or a folder: of a run (its best checkpoint), of accelerate or of the Hugging Face hub; or a
            name: `timm:NAME`, `hf-hub:OWNER/NAME`, `google:COLLECTION/NAME`, `local-dir:FOLDER`,
            `deepvit:NAME`.
        ema: take the averaged weights instead of the raw ones.
    Raises:
        UserError: the file is missing, torn, foreign, holds anything but tensors and plain values, or has no EMA.
    """
    path = find_checkpoint(path)[0]
    try:
        start = path.open("rb").read(16)
    except OSError as error:
        raise UserError(f"The weights file {path} cannot be read ({error.strerror}): give a file's path.") from None
    opened = _reader(path, start)(path, ema)
    if ema and not opened.has_ema:
        raise UserError(f"{path} holds no EMA weights: take the raw ones with weights=raw (in Python: ema=False).")
    if not opened.shapes:
        raise UserError(f"{path} holds no tensors: give a file of model weights.")
    opened.said = _hub_config(path) | opened.said
    opened.said["arch"] = arch if isinstance(arch := opened.said.get("arch"), str) else None
    return opened


def takes_average(path: str | Path, weights: str = "auto") -> bool:
    """Whether to load averaged weights (`ema` of `load_model`): `weights` is `ema`, `raw`, or `auto`, the average if
    the file has one (no for a file that cannot be opened at all)."""
    if weights not in ("auto", "ema", "raw"):
        raise UserError(f"weights={weights} is not known: choose from auto, ema, raw.")
    if weights != "auto":
        return weights == "ema"
    path = find_checkpoint(path)[0]
    try:
        open_weights(path, ema=True)
    except UserError:
        return False
    return True


def find_checkpoint(source: str | Path) -> tuple[Path, Path | None]:
    """(weights file, its run folder if it lies in one) of a folder, a file, or a name such as `timm:NAME`."""
    source = located(source)
    if source.is_dir():
        paths = [source / "checkpoints" / name for name in RUN_FILES] + [source / name for name in FOLDER_FILES]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise UserError(f"The folder {source} holds no checkpoints/best.pt or last.pt, and no "
                            f"{' or '.join(FOLDER_FILES)}: give a run's folder or a weights file.")
        return path, source if path.name in RUN_FILES else None
    run = source.parent.parent
    return source, run if source.parent.name == "checkpoints" and (run / "config.yaml").exists() else None


def _hub_config(path: Path) -> dict[str, Any]:
    """What `config.json` says of the weights beside it (timm's layout for the Hugging Face hub): architecture,
    keywords, classes, normalisation."""
    config = path.with_name("config.json")
    if path.name not in FOLDER_FILES or not config.exists():
        return {}
    try:
        content = json.loads(config.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{config} is no JSON ({reason(error)}): get it again.") from None
    told = content if isinstance(content, dict) else {}
    images = told.get("pretrained_cfg") if isinstance(told.get("pretrained_cfg"), dict) else {}
    found = {"arch": told.get("architecture"), "model_args": told.get("model_args"), "classes": told.get("label_names"),
             "mean": images.get("mean"), "std": images.get("std")}
    kinds = {"arch": str, "model_args": dict, "classes": list, "mean": list, "std": list}
    return {key: value for key, value in found.items() if isinstance(value, kinds[key])
            and (kinds[key] is not list or key == "classes" or all(isinstance(one, float) for one in value))}


def _reader(path: Path, start: bytes) -> Callable[[Path, bool], WeightsFile]:
    if start[:2] == b"PK":
        return _open_npz if npz.is_npz(path) else _open_torch
    if is_safetensors(start):
        return _open_safetensors
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        return _open_torch  # a pickle: torch before 1.6
    if start[:4] != b"\x89PNG" and start[:1] and (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        return _open_msgpack
    raise UserError(f"{path} is no weights file known here: give a PyTorch, safetensors, .npz or flax msgpack file.")


def is_safetensors(start: bytes) -> bool:
    """Whether a file begins so: the header's length in 8 bytes, then JSON. To be asked before what looks at the first
    bytes alone: a header of 640 bytes begins like a pickle."""
    return start[8:9] == b"{"


def _open_npz(path: Path, ema: bool) -> WeightsFile:
    arrays = npz.NpzFile(path)
    return WeightsFile(path, "npz", arrays.shapes, arrays.read)


def _open_msgpack(path: Path, ema: bool) -> WeightsFile:
    tensors = msgpack.read(path)
    return WeightsFile(path, "msgpack", {name: tensor.shape for name, tensor in tensors.items()}, tensors.__getitem__)


def _open_safetensors(path: Path, ema: bool) -> WeightsFile:
    try:
        with path.open("rb") as file:  # by its number: safetensors takes no name that is not UTF-8
            handle = safe_open(f"/dev/fd/{file.fileno()}", framework="pt")
        shapes = {name: torch.Size(handle.get_slice(name).get_shape()) for name in handle.keys()}
        said = json.loads((handle.metadata() or {}).get("deepvit", "{}"))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is torn or no safetensors file ({reason(error)}): get it again.") from None
    if not isinstance(said, dict):
        raise UserError(f"{path} has metadata that are no mapping: export it again.")
    return _unwrapped(path, "safetensors", {name: (shape, name) for name, shape in shapes.items()},
                      lambda name: _read_safetensor(handle, path, name), said)


def _read_safetensor(handle, path: Path, name: str) -> Tensor:
    try:
        return handle.get_tensor(name)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot give its tensor '{name}' ({reason(error)}): get it again.") from None


def _open_torch(path: Path, ema: bool) -> WeightsFile:
    content = load_plain(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, no weights by name: give a state dict.")
    averaged = next((key for key in EMA if isinstance(content.get(key), Mapping)), None)
    raw = next((key for key in RAW if isinstance(content.get(key), Mapping)), None)
    if averaged and not raw and not ema:
        raise UserError(f"{path} holds EMA weights only: take them with weights=ema (in Python: ema=True).")
    holder = averaged if ema and averaged else raw
    tensors = content[holder] if holder else content
    size = path.stat().st_size
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor, size)
    opened = _unwrapped(path, "torch", {name: (tensor.shape, name) for name, tensor in tensors.items()},
                        tensors.__getitem__, _said(content) if holder else {})
    opened.has_ema = averaged is not None
    return opened


def load_plain(path: Path) -> Any:
    """`torch.load` of tensors and plain values only; of classes, `argparse.Namespace` (published files hold one)."""
    is_zip = path.open("rb").read(2) == b"PK"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch muses on pickle protocols and sparse tensors; what matters raises
            return torch.load(path, map_location="cpu", weights_only=True,
                              mmap=is_zip and str(path).isprintable())  # it maps no file whose name is not UTF-8
    except Exception as error:  # a torn pickle may raise anything
        if "nsupported" in str(error) and "GLOBAL" in str(error):
            raise UserError(f"{path} holds Python objects besides tensors and plain values; nothing of it was run, "
                            f"and it is refused: save its state_dict alone.") from None
        if not is_zip and _pickles_objects(path):
            raise UserError(f"{path} is a plain pickle that holds Python objects and cannot be loaded safely; nothing "
                            f"of it was run, and it is refused: save its state_dict with torch.save.") from None
        why = "" if isinstance(error, pickle.UnpicklingError) else f" ({reason(error)})"  # torch's essay
        raise UserError(f"{path} is torn or no PyTorch file{why}: get it again.") from None


def _pickles_objects(path: Path) -> bool:
    """Whether the file's first pickle names a class or function: read opcode by opcode, nothing is run."""
    try:
        with path.open("rb") as file:
            return any(opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST") for opcode, *_ in pickletools.genops(file))
    except Exception:  # a torn pickle may raise anything
        return False


def _check_tensor(path: Path, name: Any, tensor: Any, size: int) -> None:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise UserError(f"{path} holds a {type(tensor).__name__} at '{str(name)[:80]}' where a tensor is expected: "
                        f"give a state dict or a checkpoint that has one.")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise UserError(f"{path} holds '{name}' in a form that is not read here ({tensor.layout}, {tensor.dtype}): "
                        f"save it as a plain tensor.")
    if tensor.numel() * tensor.element_size() > size:
        raise UserError(f"{path} claims a tensor '{name}' of {tuple(tensor.shape)}, more than the file holds: "
                        f"it is torn or forged, get it again.")


def _said(content: Mapping) -> dict[str, Any]:
    """Everything of a checkpoint but its weights; the model's name and keywords also from timm's saved arguments."""
    said = {key: value for key, value in content.items() if key not in (*RAW, *EMA, "optimizer")}
    arguments = said.get("args")
    said["arch"] = said.get("arch") or getattr(arguments, "model", None)
    if isinstance(keywords := getattr(arguments, "model_kwargs", None), dict):
        pool = {"global_pool": arguments.gp} if getattr(arguments, "gp", None) else {}
        said["model_args"] = pool | keywords
    return said


def _unwrapped(path: Path, kind: str, entries: Mapping[str, tuple[torch.Size, str]], read: Callable[[str], Tensor],
               said: dict[str, Any]) -> WeightsFile:
    """The file under names without the wrappers' prefixes."""
    original: dict[str, str] = {}
    for name in entries:
        bare = name[WRAPPERS.match(name).end():]
        if bare in original:
            raise UserError(f"{path} holds '{bare}' twice, with and without a wrapper's prefix: save one state dict.")
        original[bare] = name
    return WeightsFile(path, kind, {bare: entries[name][0] for bare, name in original.items()},
                       lambda bare: read(original[bare]), said)
