"""What a data set is to the rest: targets in an array, images on demand, memory flat across workers."""

import hashlib
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from PIL import Image

from deepvit.data.decode import BadImage, AnyImage, as_array, as_image, decode, read_bytes
from deepvit.data.listing import Listing
from deepvit.data.stream import stable_hash

IN_MEMORY_MB = 512  # a folder whose decoded images fit is decoded once and kept


class ImageSet(ABC):
    """Labelled images. `targets` is int64 [n]; index i is the same image in every process.

    Anything of the size of the set lives in numpy arrays: Python lists would be copied into every worker, page by
    page, as their reference counts are touched.
    """

    per_image: ClassVar[tuple[str, ...]] = ("targets",)  # the arrays that `take` takes from
    targets: np.ndarray
    decoder: str  # `torchvision` or `pil`
    refused: int = 0  # images that the fast decoder refused and PIL read, in this process
    in_memory: bool = False  # whether all images are there, decoded

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def name(self, index: int) -> str:
        """Path or identifier of an image, for messages and per-image results."""

    @abstractmethod
    def image(self, index: int) -> AnyImage:
        """RGB image: PIL, or uint8 [3, H, W]. Raises BadImage with the reason."""

    def take(self, indices: np.ndarray) -> Self:
        """The set of the given indices, in their order."""
        part = copy(self)
        vars(part).update({name: getattr(self, name)[indices] for name in self.per_image})
        return part

    def _opened(self, data: bytearray) -> AnyImage:
        """The image in the bytes of a file; what the fast decoder refuses is counted."""
        image, refused = decode(data, self.decoder)
        self.refused += refused
        return image

    def fingerprint(self) -> str:
        """16 hex digits that tell whether two sets hold the same images in the same order, wherever they lie."""
        digest = hashlib.blake2b(digest_size=8)
        for part in self._identity():
            digest.update(part)
        return digest.hexdigest()

    def _identity(self) -> Iterator[bytes | np.ndarray]:
        yield np.ascontiguousarray(self.targets)

    def find(self, names: Collection[str]) -> np.ndarray:
        """Indices of the images of these names, in order."""
        return np.array([index for index in range(len(self)) if self.name(index) in names], np.int64)

    def size_mark(self) -> str:
        """16 hex digits from the sizes of 1,000 images at places fixed by a hash: re-encoded ones give others."""
        n = len(self)
        places = range(n) if n <= 1000 else sorted({stable_hash("size", n, draw) % n for draw in range(1000)})
        sizes = np.array([self.size(place) for place in places], np.int64)
        return hashlib.blake2b(sizes.tobytes(), digest_size=8).hexdigest()

    def size(self, index: int) -> int:
        """Bytes of the encoded image; 0 where the source does not tell."""
        return 0

    def prepare(self) -> None:  # noqa: B027  nothing to do for most
        """Called in the main process before images are asked for in others: load what is worth keeping."""


class ArraySet(ImageSet):
    """Images already decoded: uint8 [n, H, W, 3]."""

    per_image = ("targets", "pixels", "ids")
    in_memory = True

    def __init__(self, pixels: np.ndarray, targets: np.ndarray, label: str, *, decoder: str = "torchvision",
                 ids: np.ndarray | None = None):
        self.pixels, self.targets, self.label, self.decoder = pixels, targets.astype(np.int64), label, decoder
        self.ids = np.arange(len(targets)) if ids is None else ids

    def name(self, index: int) -> str:
        return f"{self.label}/{self.ids[index]}"

    def size(self, index: int) -> int:
        return zlib.crc32(self.pixels[index].tobytes())  # there is no file: the pixels themselves

    def image(self, index: int) -> AnyImage:
        return as_image(self.pixels[index], self.decoder)


class FileSet(ImageSet):
    """Images in files `root/<class folder>/<name>`; a small set is decoded once, in `prepare`.

    labels: class of each folder; None: its number.
    """

    per_image = ("targets", "places")

    def __init__(self, root: Path, folders: list[str], listing: Listing, *, decoder: str,
                 in_memory_mb: int = IN_MEMORY_MB, labels: np.ndarray | None = None):
        self.root, self.folders, self.listing = Path(root), folders, listing
        self.decoder, self.in_memory_mb = decoder, in_memory_mb
        self.places = listing.places  # of their class folders
        self.targets = self.places if labels is None else labels[self.places].astype(np.int64)
        self.rows: np.ndarray | None = None  # in the listing; None: all of it
        self.kept: Kept | None = None

    @property
    def in_memory(self) -> bool:
        return self.kept is not None

    def name(self, index: int) -> str:
        file = self.listing.name(index if self.rows is None else self.rows[index])
        return f"{self.root}/{self.folders[self.places[index]]}/{os.fsdecode(file)}"

    def image(self, index: int) -> AnyImage:
        if self.kept is not None:
            self.refused += int(self.kept.refused[index])
            return self.kept.image(index, self.decoder)
        return self._opened(read_bytes(self.name(index)))

    def size(self, index: int) -> int:
        try:
            return os.stat(self.name(index)).st_size
        except OSError:
            return -1

    def _identity(self) -> Iterator[bytes | np.ndarray]:
        yield from (np.ascontiguousarray(self.targets), np.ascontiguousarray(self.places))
        yield from self.listing.padded(range(len(self)) if self.rows is None else self.rows)
        yield os.fsencode("/".join(self.folders))

    def find(self, names: Collection[str]) -> np.ndarray:
        rows = [row for row in map(self._row, names) if row is not None]
        return np.array(sorted(rows), np.int64) if self.rows is None else np.flatnonzero(np.isin(self.rows, rows))

    def _row(self, name: str) -> int | None:
        folder, _, file = name.removeprefix(f"{self.root}/").partition("/")
        return self.listing.find(self.folders.index(folder), os.fsencode(file)) if folder in self.folders else None

    def take(self, indices: np.ndarray) -> Self:
        part = super().take(indices)
        part.rows, part.kept = indices if self.rows is None else self.rows[indices], None
        return part

    def prepare(self) -> None:
        if self.kept is None and len(self) * self._mean_bytes() <= self.in_memory_mb * 2**20:
            self.kept = Kept.decode_all(self)

    def _mean_bytes(self) -> float:
        """Of a decoded image, estimated from the headers of 32 files."""
        sizes = []
        for index in np.linspace(0, len(self) - 1, num=min(32, len(self)), dtype=np.int64).tolist():
            # A bad image weighs nothing here; it is reported when it is asked for.
            with suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError), \
                    Image.open(self.name(index)) as image:
                sizes.append(3 * image.width * image.height)
        return float(np.mean(sizes)) if sizes else 0.0


@dataclass
class Kept:
    """Decoded images of any sizes, end to end in one buffer that forked workers share."""

    pixels: np.ndarray  # uint8 [sum of H * W * 3]
    starts: np.ndarray  # int64 [n]
    shapes: np.ndarray  # int32 [n, 2], height and width; 0, 0 for a bad image
    refused: np.ndarray  # bool [n]: PIL read what the fast decoder refused
    reasons: dict[int, str]  # of the bad ones

    @staticmethod
    def decode_all(images: FileSet) -> "Kept":
        parts, shapes, refused, reasons = [], np.zeros((len(images), 2), np.int32), np.zeros(len(images), bool), {}
        for index in range(len(images)):
            try:
                image, refused[index] = decode(read_bytes(images.name(index)), images.decoder)
            except BadImage as bad:
                reasons[index] = str(bad)
                continue
            pixels = as_array(image)
            shapes[index] = pixels.shape[:2]
            parts.append(pixels.reshape(-1))
        lengths = shapes.astype(np.int64).prod(axis=1) * 3
        pixels = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
        return Kept(pixels, np.cumsum(lengths) - lengths, shapes, refused, reasons)

    def image(self, index: int, decoder: str) -> AnyImage:
        if index in self.reasons:
            raise BadImage(self.reasons[index])
        (height, width), start = self.shapes[index], self.starts[index]
        pixels = self.pixels[start:start + int(height) * int(width) * 3].reshape(height, width, 3)
        return as_image(pixels, decoder)


@dataclass(frozen=True)
class Splits:
    """A training and a validation set over the same classes, in class-index order."""

    train: ImageSet
    val: ImageSet
    class_names: list[str]  # readable
    class_ids: list[str]  # folder names (wnids for ImageNet); what a checkpoint stores and evaluation compares


def balanced_part(targets: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted indices of a fixed, class-balanced part: of each class round(fraction * its size), at least one."""
    order = np.argsort(targets, kind="stable")  # class by class
    classes, starts = np.unique(targets[order], return_index=True)
    chosen = []
    for target, members in zip(classes.tolist(), np.split(order, starts[1:]), strict=True):
        shuffled = np.random.default_rng(stable_hash("part", seed, target)).permutation(len(members))
        chosen.append(members[shuffled[:max(1, round(fraction * len(members)))]])
    return np.sort(np.concatenate(chosen))
