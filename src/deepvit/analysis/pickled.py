"""The published code's attention pickle (`attn_visualize.py`'s input), read without trusting it, as a study to draw.

The file holds one pickled object per block: its maps `[B, H, N, N]` as a tensor or array, or a list or dict whose item
3 they are (beside p, q and v). A single list of maps works too."""

import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from deepvit.analysis.measures import attention_entropy, effective_rank
from deepvit.analysis.similarity import cross_layer_similarity, head_similarity, similar_blocks
from deepvit.analysis.study import Study
from deepvit.errors import UserError, first_line

MAPS = 3  # the item of a block that its maps are
FLOATS = ("f2", "f4", "f8")


def read_pickled_maps(path: Path) -> list[Tensor]:
    """The maps of each block, float32 `[B, H, N, N]`; nothing that the file names is ever called. Raises UserError if
    the file cannot be read, or holds anything but finite maps of one shape."""
    objects = []
    try:
        with path.open("rb") as file:
            while file.peek(1):
                objects.append(_Unpickler(file).load())
    except OSError as error:
        raise UserError(f"The maps {path} cannot be read ({error.strerror}): give a file's path.") from None
    except Exception as error:  # a torn or forged pickle may raise anything
        raise UserError(f"{path} is torn, or not a pickle of arrays and tensors alone "
                        f"({first_line(error)[:100].rstrip(' .:')}): save the maps [B, H, N, N] of each block, one "
                        f"pickle.dump after the other.") from None
    maps = [*map(_tensor, _blocks(objects))]
    *others, shape = dict.fromkeys(map(_shape, maps)) or [None]
    if others or shape is None or len(shape) != 4 or shape[2] != shape[3] or min(shape) == 0:
        raise UserError(f"{path} holds no attention maps [B, H, N, N] of one shape for each block (one is "
                        f"{shape or 'something else'}): save item 3 of each block as the published code reads it.")
    if not all(torch.isfinite(one).all() for one in maps):
        raise UserError(f"{path} holds maps with entries that are not finite: save them anew.")
    return [one.float() for one in maps]


def study_of_maps(maps: Sequence[Tensor], name: str) -> Study:
    """What can be drawn from maps alone."""
    images, heads, tokens = maps[0].shape[:3]
    similarity = {}
    for kind, is_centred in {"final": False, "final_centred": True}.items():
        matrix = cross_layer_similarity(maps, minus_uniform=is_centred)  # [L, L]
        similarity[kind] = {"adjacent": matrix.diagonal(1).tolist(), "matrix": matrix.tolist(),
                            "similar_blocks": similar_blocks(matrix)}
    probe = {"images": images, "tokens": tokens, "heads": heads, "blocks": len(maps), "similarity": similarity,
             "rank": {"final": [float(effective_rank(one).mean()) for one in maps]},
             "head_similarity": {"final": [head_similarity(one) for one in maps]},
             "entropy": [None if (one < 0).any() else float(attention_entropy(one).mean()) for one in maps]}
    tensors = {"mean_maps": torch.stack([one.mean((0, 1)) for one in maps]),
               "head_maps": torch.stack([one[0].half() for one in maps])}
    return Study(tensors, {"name": name, "attention": "maps as recorded", "pictures": ["of the pickle"], "top": [],
                           "probe": probe, "initial": None})


def _blocks(objects: list[Any]) -> list[Any]:
    """What holds the maps of each block."""
    if len(objects) == 1 and isinstance(objects[0], list | tuple):
        shapes = {_shape(_tensor(one)) for one in objects[0]}
        if len(shapes) == 1 and shapes != {None}:  # of a single block, q and v are not as wide as the maps
            return list(objects[0])
    items = [dict(enumerate(block)) if isinstance(block, list | tuple) else block for block in objects]
    return [item.get(MAPS) if isinstance(item, dict) else item for item in items]


def _shape(maps: Tensor | None) -> tuple[int, ...] | None:
    return None if maps is None else tuple(maps.shape)


def _tensor(value: Any) -> Tensor | None:
    value = value.array if isinstance(value, _Array) else value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))  # a copy that may be written to
    return value if isinstance(value, Tensor) else None


class _DType:
    """Stands for numpy.dtype: floats of the three usual widths."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if code not in FLOATS:
            raise pickle.UnpicklingError(f"arrays of type {str(code)[:20]}")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "="):
            raise pickle.UnpicklingError("an unknown byte order")
        self.order = state[1]

    def array(self, raw: bytes, shape: Sequence[int], fortran: bool) -> np.ndarray:
        return np.frombuffer(raw, np.dtype(self.order + self.code)).reshape(shape, order="F" if fortran else "C")


class _Array:
    """Stands for numpy's `_reconstruct`: an array whose state follows."""

    array = None

    def __init__(self, *ignored: Any): ...

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = dtype.array(raw, shape, fortran)


def _storage(raw: bytes) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks on pickle protocols; what matters raises
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def _rebuilt(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *ignored: Any) -> Tensor:
    """torch's `_rebuild_tensor_v2`, which would enlarge a storage that is too small."""
    if min((offset, *size, *stride)) < 0 or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor of negative size")
    flat = torch.tensor([], dtype=storage.dtype).set_(storage)
    if not flat.is_floating_point() or offset + sum((n - 1) * step for n, step in zip(size, stride)) >= len(flat):
        raise pickle.UnpicklingError("a tensor larger than its storage, or not of floats")
    return flat.as_strided(size, stride, offset)


_ALLOWED: dict[tuple[str, str], Callable] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt, ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *ignored: tensor,
    ("collections", "OrderedDict"): OrderedDict, ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
    ("numpy", "dtype"): _DType, ("numpy", "ndarray"): _Array,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): lambda raw, dtype, shape, order: dtype.array(raw, shape, order == "F")
       for core in ("core", "_core")}}


class _Unpickler(pickle._Unpickler):  # Python's own: C's keeps a table as large as the largest index that a file names
    """Knows arrays and tensors, by the stand-ins above, and nothing else."""

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module[:40]}.{name[:40]}")
        return _ALLOWED[module, name]

    def load_build(self) -> None:
        """Sets attributes of stand-ins alone: on anything else it could be a function's."""
        if not isinstance(self.stack[-2], (_Array, _DType)):
            raise pickle.UnpicklingError("it sets attributes")
        super().load_build()

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}
