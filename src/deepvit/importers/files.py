"""Weights files opened without trust: names and shapes first, one tensor at a time after, never a pickle executed."""

import argparse
import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Size, Tensor

from deepvit.errors import UserError, reason
from deepvit.importers.locate import IMAGES, find_checkpoint, hub_metadata, released, told_images

# Where trainers keep the weights in a checkpoint
RAW, EMA = ("state_dict", "model", "model_state_dict", "net"), ("state_dict_ema", "ema", "model_ema")
# Prefixes of names: by DistributedDataParallel, torch.compile, Lightning; by flax
WRAPPERS = re.compile(r"(?:(?:module|_orig_mod|model|net)\.|params/)*")

FREE_BYTES, MAX_RATIO = 2**30, 20  # an .npz may unpack to 1 GiB, or to 20 times its size: weights hardly compress
FLAX_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64")}
FLAX_ARRAYS = (1, 3)  # flax's ext types of an array and a scalar; both hold (shape, dtype name, bytes)
MAX_LIST = 8  # of flax's lists, such as a shape; msgpack reserves what a length announces


@dataclass
class WeightsFile:
    """A file's tensors by name: `shapes` at once, `read(name)` one tensor (on the CPU, maybe a view of the file);
    `said` is its metadata: `arch`, `model_args`, `config`, `classes`, `format`, ..."""

    path: Path
    shapes: dict[str, Size]
    read: Callable[[str], Tensor]
    said: dict[str, Any] = field(default_factory=dict)
    is_average: bool = False  # EMA weights


def open_weights(path: str | Path, ema: bool | None = False) -> WeightsFile:
    """Opens a weights file of any known format, detected by its content; `path` as for `find_checkpoint`, `ema`: the
    averaged weights instead of the raw ones (None: if it has any). Raises UserError if the file is missing, torn,
    foreign, holds anything but tensors and plain values, or has no EMA."""
    path = find_checkpoint(path)[0]
    try:
        start = path.open("rb").read(16)
    except OSError as error:
        hint = f" Did you mean 'deepvit:{path}'?" if f"deepvit:{path}" in released() else ""
        raise UserError(f"The weights file {path} cannot be read ({error.strerror}): give a file's path."
                        f"{hint}") from None
    opened = _opener(path, start)(path, ema)
    if ema and not opened.is_average:
        raise UserError(f"{path} holds no EMA weights: take the raw ones with weights=raw (in Python: ema=False).")
    if not opened.shapes:
        raise UserError(f"{path} holds no tensors: give a file of model weights.")
    said = {key: value for key, value in opened.said.items() if key not in IMAGES}
    opened.said = hub_metadata(path) | said | told_images(opened.said)
    for key, kind in (("arch", str), ("model_args", dict)):
        opened.said[key] = value if isinstance(value := opened.said.get(key), kind) else None
    return opened


def is_safetensors(start: bytes) -> bool:
    """Whether a file begins so: the header's length in 8 bytes, then JSON. Ask this before looking at the first bytes
    alone: a header of 640 bytes begins like a pickle."""
    return start[8:9] == b"{"


def _opener(path: Path, start: bytes) -> Callable[[Path, bool | None], WeightsFile]:
    if start[:2] == b"PK":
        return _open_npz if _is_npz(path) else _open_torch
    if is_safetensors(start):
        return _open_safetensors
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        return _open_torch  # a pickle: torch before 1.6
    if start[:4] != b"\x89PNG" and start[:1] and (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        return _open_msgpack
    raise UserError(f"{path} is not a weights file of a known format: give PyTorch, safetensors, .npz or flax msgpack.")


@contextmanager
def _refuse_torn(path: Path, kind: str) -> Iterator[None]:
    """A torn file may raise anything; all of it means the same."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is torn or no {kind} file ({reason(error)}): get it again.") from None


def _unwrapped(path: Path, shapes: Mapping[str, Size], read: Callable[[str], Tensor],
               said: dict[str, Any] | None = None) -> WeightsFile:
    """The file under names without the wrappers' prefixes."""
    original: dict[str, str] = {}
    for name in shapes:
        bare = name[WRAPPERS.match(name).end():]
        if bare in original:
            raise UserError(f"{path} holds '{bare}' twice, with and without a wrapper's prefix: save one state dict.")
        original[bare] = name
    return WeightsFile(path, {bare: shapes[name] for bare, name in original.items()},
                       lambda bare: read(original[bare]), said or {})


# PyTorch

def _open_torch(path: Path, ema: bool | None) -> WeightsFile:
    content = _load_plain(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__} instead of weights by name: give a state dict.")
    raw, averaged = (next((content[key] for key in keys if isinstance(content.get(key), Mapping)), None)
                     for keys in (RAW, EMA))
    if averaged and not raw and ema is False:
        raise UserError(f"{path} holds EMA weights only: take them with weights=ema (in Python: ema=True).")
    is_average = ema is not False and bool(averaged)
    tensors = averaged if is_average else content if raw is None else raw
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor)
    opened = _unwrapped(path, {name: tensor.shape for name, tensor in tensors.items()}, tensors.__getitem__,
                        {} if tensors is content else _metadata(content))
    opened.is_average = is_average
    return opened


def _load_plain(path: Path) -> Any:
    """`torch.load` of tensors and plain values only; of classes, `argparse.Namespace` (published files hold one)."""
    is_zip = path.open("rb").read(2) == b"PK"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and sparse tensors; what matters raises
            return torch.load(path, map_location="cpu", weights_only=True,
                              mmap=is_zip and str(path).isprintable())  # it maps no file whose name is not UTF-8
    except Exception as error:  # a torn pickle may raise anything
        why = "" if isinstance(error, pickle.UnpicklingError) else f" ({reason(error)})"  # torch's essay
        raise UserError(f"{path} is torn or holds Python objects (nothing was run){why}: get it again, or save its "
                        f"state_dict alone with torch.save.") from None


def _check_tensor(path: Path, name: Any, tensor: Any) -> None:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise UserError(f"{path} holds a {type(tensor).__name__} at '{str(name)[:80]}', no tensor: give a state dict.")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise UserError(f"{path} holds '{name}' as {tensor.layout}, {tensor.dtype}: save it as a plain tensor.")
    if tensor.numel() * tensor.element_size() > path.stat().st_size:
        raise UserError(f"{path} claims '{name}' of {tuple(tensor.shape)}, more than the file holds: get it again.")


def _metadata(content: Mapping) -> dict[str, Any]:
    """All of a checkpoint but its weights and optimizer; the model's name and keywords, and how its images were
    prepared, also from timm's saved arguments."""
    said = {key: value for key, value in content.items() if key not in RAW + EMA and not str(key).startswith("optim")}
    arguments = said.get("args")
    said["arch"] = said.get("arch") or getattr(arguments, "model", None)
    if isinstance(keywords := getattr(arguments, "model_kwargs", None), dict):
        pool = {"global_pool": arguments.gp} if getattr(arguments, "gp", None) else {}
        said["model_args"] = pool | keywords
    return told_images(getattr(arguments, "__dict__", None)) | said


# safetensors

def _open_safetensors(path: Path, ema: bool | None) -> WeightsFile:
    with _refuse_torn(path, "safetensors"):
        with path.open("rb") as file:  # by its number: safetensors takes no name that is not UTF-8
            handle = safe_open(f"/dev/fd/{file.fileno()}", framework="pt")
        shapes = {name: Size(handle.get_slice(name).get_shape()) for name in handle.keys()}
        said = json.loads((handle.metadata() or {}).get("deepvit", "{}"))
    if not isinstance(said, dict):
        raise UserError(f"{path} has metadata that is not a mapping: export it again.")

    def read(name: str) -> Tensor:
        with _refuse_torn(path, "safetensors"):
            return handle.get_tensor(name)

    return _unwrapped(path, shapes, read, said)


# numpy's .npz, sizes checked against the archive before anything is allocated

def _is_npz(path: Path) -> bool:
    """Whether a zip file is numpy's (a PyTorch checkpoint is one too)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except Exception:  # torn in one of many ways: the suffix decides which reader says so
        return path.suffix == ".npz"


def _open_npz(path: Path, ema: bool | None) -> WeightsFile:
    with _refuse_torn(path, ".npz"):
        archive = zipfile.ZipFile(path)
        entries = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        unpacked = sum(info.file_size for info in entries)
        if unpacked > max(FREE_BYTES, MAX_RATIO * path.stat().st_size):
            raise UserError(f"{path} would unpack to {unpacked / 2**20:,.0f} MiB, as no weights would: get it again.")
        shapes = {info.filename.removesuffix(".npy"): _npy_shape(path, archive, info) for info in entries}

    def read(name: str) -> Tensor:
        with _refuse_torn(path, ".npz"), archive.open(f"{name}.npy") as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
            return torch.from_numpy(np.asarray(array, array.dtype.newbyteorder("=")))

    return _unwrapped(path, shapes, read)


def _npy_shape(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Size:
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = header[version](stream)
        held = info.file_size - stream.tell()
    if dtype.kind not in "fiub":
        raise UserError(f"{path} holds '{info.filename}' of type {dtype}, not an array of numbers: it is refused.")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held:
        raise UserError(f"{path}: '{info.filename}' of {shape} does not match its {held} bytes: get it again.")
    return Size(shape)


# What `flax.serialization.to_bytes` writes: msgpack of nested maps whose leaves are arrays

def _open_msgpack(path: Path, ema: bool | None) -> WeightsFile:
    """The arrays of a flax tree by path (`Transformer_0/Attention_0/...`)."""
    try:
        from msgpack import unpackb
    except ImportError:
        raise UserError(f"{path} is a flax msgpack file, which needs msgpack: pip install 'deepvit[flax]'.") from None

    def array(code: int, content: bytes) -> Tensor:
        if code not in FLAX_ARRAYS:
            raise ValueError(f"extension type {code}, which is no array")
        return _flax_array(unpackb(content, max_array_len=MAX_LIST))

    with _refuse_torn(path, "flax msgpack"):
        tree = unpackb(path.read_bytes(), ext_hook=array, object_pairs_hook=_flax_branch, max_array_len=MAX_LIST)
        tensors = dict(_flax_leaves(tree))
    return _unwrapped(path, {name: tensor.shape for name, tensor in tensors.items()}, tensors.__getitem__)


def _flax_branch(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs) or not all(isinstance(key, str) for key in tree):
        raise ValueError("a key that is not text, or occurs twice")
    return tree


def _flax_array(parts: Any) -> Tensor:
    shape, dtype, content = parts
    if min(shape, default=0) < 0:  # which a view would fill in
        raise ValueError("an array with a side below 0")
    flat = torch.frombuffer(bytearray(memoryview(content)), dtype=FLAX_DTYPES[dtype]) if content else torch.empty(0)
    return flat.view(shape)


def _flax_leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield prefix, tree
    elif isinstance(tree, dict):
        for key, branch in tree.items():
            yield from _flax_leaves(branch, f"{prefix}/{key}" if prefix else key)
    else:
        raise ValueError(f"'{prefix[:80]}' is a {type(tree).__name__}, not an array")
