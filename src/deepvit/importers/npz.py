"""numpy's .npz read array by array, sizes checked against the archive before anything is allocated."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepvit.errors import UserError, reason

FREE_BYTES, MAX_RATIO = 2**30, 20  # an archive may unpack to 1 GiB, or to 20 times its size: weights hardly compress


def is_npz(path: Path) -> bool:
    """Whether a zip file is numpy's (a PyTorch checkpoint is one too)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except Exception:  # torn in one of many ways: the suffix decides which reader says so
        return path.suffix == ".npz"


class NpzFile:
    """Shapes and lazily read arrays of one .npz; never unpickles (`allow_pickle=False`)."""

    def __init__(self, path: Path):
        self.path = path
        with self._torn_is_said():
            self.archive = zipfile.ZipFile(path)
            entries = [info for info in self.archive.infolist() if info.filename.endswith(".npy")]
            unpacked = sum(info.file_size for info in entries)
            if unpacked > max(FREE_BYTES, MAX_RATIO * path.stat().st_size):
                raise UserError(f"{path} would unpack to {unpacked / 2**20:,.0f} MiB, far more than weights of its "
                                f"size could: it is refused.")
            self.shapes = {info.filename.removesuffix(".npy"): self._shape(info) for info in entries}

    def read(self, name: str) -> Tensor:
        with self._torn_is_said(), self.archive.open(f"{name}.npy") as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
            return torch.from_numpy(np.asarray(array, array.dtype.newbyteorder("=")))

    def _shape(self, info: zipfile.ZipInfo) -> torch.Size:
        with self.archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = header[version](stream)
            held = info.file_size - stream.tell()
        if dtype.kind not in "fiub":
            raise UserError(f"{self.path} holds '{info.filename}' of type {dtype}, no array of numbers: it is refused.")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held:
            raise UserError(f"{self.path} claims an array '{info.filename}' of {shape} that does not match its {held} "
                            f"bytes: it is torn or forged, get it again.")
        return torch.Size(shape)

    @contextmanager
    def _torn_is_said(self) -> Iterator[None]:
        """zipfile, zlib and numpy's header parser raise a dozen kinds of errors on torn files; all mean the same."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.path} is torn or no .npz file ({reason(error)}): get it again.") from None
