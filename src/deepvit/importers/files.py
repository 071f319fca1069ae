"""Weights files opened without trust: names and shapes first, one tensor at a time after, never a pickle executed."""

import argparse
import json
import pickle
import pickletools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepvit.errors import UserError
from deepvit.importers import msgpack, npz

RAW, EMA = ("state_dict", "model"), ("state_dict_ema", "ema", "model_ema")  # where checkpoints keep their weights
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DataParallel and torch.compile


@dataclass
class WeightsFile:
    """A file's tensors by name.

    `shapes` is known at once, `read(name)` fetches one tensor (on the CPU, maybe a view of the file);
    `said` is what the file tells beside tensors: `arch`, `config`, `classes`, `format`, ...
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
        path: the file, or a run folder, which stands for its best checkpoint.
        ema: take the averaged weights instead of the raw ones.
    Raises:
        UserError: the file is missing, torn, foreign, holds anything but tensors and plain values, or has no EMA.
    """
    path = find_checkpoint(Path(path))[0]
    try:
        start = path.open("rb").read(16)
    except OSError as error:
        raise UserError(f"The weights file {path} cannot be read ({error.strerror}): give a file's path.") from None
    opened = _reader(path, start)(path, ema)
    if ema and not opened.has_ema:
        raise UserError(f"{path} holds no EMA weights: take the raw ones with weights=raw (in Python: ema=False).")
    if not opened.shapes:
        raise UserError(f"{path} holds no tensors: give a file of model weights.")
    return opened


def has_average(path: Path) -> bool:
    """Whether the file holds averaged weights, be it beside raw ones; False for one that cannot be opened at all."""
    try:
        open_weights(path, ema=True)
    except UserError:
        return False
    return True


def find_checkpoint(source: Path) -> tuple[Path, Path | None]:
    """(weights file, its run folder if it lies in one) of a run folder or a file."""
    if source.is_dir():
        found = [source / "checkpoints" / name for name in ("best.pt", "last.pt")]
        path = next((path for path in found if path.exists()), None)
        if path is None:
            raise UserError(f"The folder {source} holds no checkpoints/best.pt or last.pt: "
                            f"give a run's folder or a weights file.")
        return path, source
    run = source.parent.parent
    return source, run if source.parent.name == "checkpoints" and (run / "config.yaml").exists() else None


def _reader(path: Path, start: bytes) -> Callable[[Path, bool], WeightsFile]:
    if start[:2] == b"PK":
        return _open_npz if npz.is_npz(path) else _open_torch
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        return _open_torch  # a pickle: torch before 1.6
    if start[8:9] == b"{":
        return _open_safetensors
    if start[:1] and (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        return _open_msgpack
    raise UserError(f"{path} is no weights file known here: give a PyTorch, safetensors, .npz or flax msgpack file.")


def _open_npz(path: Path, ema: bool) -> WeightsFile:
    arrays = npz.NpzFile(path)
    return WeightsFile(path, "npz", arrays.shapes, arrays.read)


def _open_msgpack(path: Path, ema: bool) -> WeightsFile:
    tensors = msgpack.read(path)
    return WeightsFile(path, "msgpack", {name: tensor.shape for name, tensor in tensors.items()}, tensors.__getitem__)


def _open_safetensors(path: Path, ema: bool) -> WeightsFile:
    try:
        handle = safe_open(path, framework="pt")
        shapes = {name: torch.Size(handle.get_slice(name).get_shape()) for name in handle.keys()}
        said = json.loads((handle.metadata() or {}).get("deepvit", "{}"))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is torn or no safetensors file ({_first_sentence(error)}): get it again.") from None
    if not isinstance(said, dict):
        raise UserError(f"{path} has metadata that are no mapping: export it again.")
    return _unwrapped(path, "safetensors", {name: (shape, name) for name, shape in shapes.items()},
                      lambda name: _read_safetensor(handle, path, name), said)


def _read_safetensor(handle, path: Path, name: str) -> Tensor:
    try:
        return handle.get_tensor(name)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot give its tensor '{name}' ({_first_sentence(error)}): get it again.") from None


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
        why = "" if isinstance(error, pickle.UnpicklingError) else f" ({_first_sentence(error)})"  # torch's essay
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
    """Everything of a checkpoint but its weights; `arch` also from the arguments that were saved with it."""
    said = {key: value for key, value in content.items() if key not in (*RAW, *EMA, "optimizer")}
    arch = said.get("arch") or getattr(said.get("args"), "model", None)
    return said | ({"arch": arch} if isinstance(arch, str) else {"arch": None})


def _unwrapped(path: Path, kind: str, entries: Mapping[str, tuple[torch.Size, str]], read: Callable[[str], Tensor],
               said: dict[str, Any]) -> WeightsFile:
    """The file under names without the wrappers' prefixes."""
    original: dict[str, str] = {}
    for name in entries:
        bare = name
        for prefix in WRAPPERS:
            bare = bare.removeprefix(prefix)
        if bare in original:
            raise UserError(f"{path} holds '{bare}' twice, with and without a wrapper's prefix: save one state dict.")
        original[bare] = name
    return WeightsFile(path, kind, {bare: entries[name][0] for bare, name in original.items()},
                       lambda bare: read(original[bare]), said)


def _first_sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)}".splitlines()[0].split(". ")[0][:100].rstrip(": .")


