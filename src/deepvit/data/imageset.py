"""The interface of every data set: targets in an array, images on demand, no memory copied into workers."""

import hashlib
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from deepvit.data.decode import BadImage, AnyImage, as_array, as_image, decode, read_bytes
from deepvit.data.listing import Listing
from deepvit.data.stream import stable_hash


class ImageSet(ABC):
    """Labelled images; index i is the same image in every process. What has an entry per image is a numpy array: lists
    would be copied into every worker, page by page, as their reference counts are touched."""

    targets: np.ndarray  # int64 [n]
    decoder: str  # `torchvision` or `pil`
    pil_fallbacks: int = 0  # images that the fast decoder refused and PIL read, in this process

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def name(self, index: int) -> str:
        """Path or identifier of an image, for messages and per-image results."""

    @abstractmethod
    def image(self, index: int) -> AnyImage:
        """RGB. Raises BadImage with the reason."""

    def take(self, indices: np.ndarray) -> Self:
        """The set of the given indices, in their order."""
        part = copy(self)
        vars(part).update({name: value[indices] for name, value in vars(self).items() if isinstance(value, np.ndarray)})
        return part

    def _opened(self, data: bytearray) -> AnyImage:
        image, by_pil = decode(data, self.decoder)
        self.pil_fallbacks += by_pil
        return image

    def fingerprint(self) -> str:
        """16 hex digits that tell whether two sets hold the same images in the same order, wherever they lie."""
        digest = hashlib.blake2b(digest_size=8)
        for part in self._identity():
            digest.update(part)
        return digest.hexdigest()

    def _identity(self) -> Iterator[bytes | np.ndarray]:
        yield np.ascontiguousarray(self.targets)

    def size_mark(self) -> str:
        """16 hex digits from the sizes of 1,000 images at places fixed by a hash: re-encoded ones give others."""
        n = len(self)
        places = range(n) if n <= 1000 else sorted({stable_hash("size", n, draw) % n for draw in range(1000)})
        sizes = np.array([self.size(place) for place in places], np.int64)
        return hashlib.blake2b(sizes.tobytes(), digest_size=8).hexdigest()

    def size(self, index: int) -> int:
        """Bytes of the encoded image; 0 where the source does not tell."""
        return 0

    def cache_decoded(self) -> bool:
        """Called in the main process before others ask for images: keeps a small set decoded. Whether all are there."""
        return False


class ArraySet(ImageSet):
    """Images already decoded: uint8 [n, H, W, 3]."""

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

    def cache_decoded(self) -> bool:
        return True


class FileSet(ImageSet):
    """Images in files `root/<class folder>/<name>`; targets are the folders' numbers."""

    def __init__(self, root: Path, folders: list[str], listing: Listing, *, decoder: str, in_memory_mb: int = 0):
        self.root, self.folders, self.listing = Path(root), folders, listing
        self.decoder, self.in_memory_mb = decoder, in_memory_mb
        self.targets = self.places = listing.places  # of their class folders
        self.rows: np.ndarray | range = range(len(listing))
        self.cache: list[tuple[np.ndarray, bool] | None] | None = None  # what `_decoded` gives of each

    def name(self, index: int) -> str:
        file = os.fsdecode(self.listing.name(self.rows[index]))
        return f"{self.root}/{self.folders[self.places[index]]}/{file}"

    def image(self, index: int) -> AnyImage:
        kept = self.cache and self.cache[index]
        if not kept:
            return self._opened(read_bytes(self.name(index)))
        pixels, by_pil = kept
        self.pil_fallbacks += by_pil
        return as_image(pixels, self.decoder)

    def size(self, index: int) -> int:
        try:
            return os.stat(self.name(index)).st_size
        except OSError:
            return -1

    def _identity(self) -> Iterator[bytes | np.ndarray]:
        yield from (np.ascontiguousarray(self.targets), np.ascontiguousarray(self.places))
        yield from self.listing.padded(self.rows)
        yield os.fsencode("/".join(self.folders))

    def take(self, indices: np.ndarray) -> Self:
        part = super().take(indices)
        part.rows, part.cache = np.asarray(self.rows)[indices], None
        return part

    def cache_decoded(self) -> bool:
        """Only if their size, estimated from the headers of 32 files, is within `in_memory_mb`."""
        if self.cache is not None:
            return True
        sizes = []
        for index in np.linspace(0, len(self) - 1, num=min(32, len(self)), dtype=np.int64).tolist():
            with suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError), \
                    Image.open(self.name(index)) as image:  # a bad one is reported when it is asked for
                sizes.append(3 * image.width * image.height)
        if len(self) * np.mean(sizes or [0]) > self.in_memory_mb * 2**20:
            return False
        self.cache = [self._decoded(index) for index in range(len(self))]
        return True

    def _decoded(self, index: int) -> tuple[np.ndarray, bool] | None:
        """uint8 [H, W, 3], which forked workers share (they copy 170 bytes an image), and whether PIL read it."""
        with suppress(BadImage):  # it tells its reason when it is asked for
            image, by_pil = decode(read_bytes(self.name(index)), self.decoder)
            return as_array(image), by_pil
        return None


@dataclass(frozen=True)
class Splits:
    """A training and a validation set over the same classes, in class-index order."""

    train: ImageSet
    val: ImageSet
    class_ids: list[str]  # folder names (wnids for ImageNet); what a checkpoint stores and evaluation compares

    @property
    def class_names(self) -> list[str]:
        """Readable names: the first lemmas of an ImageNet wnid (timm's list), other names made printable."""
        if not all(re.fullmatch(r"n\d{8}", name) for name in self.class_ids):
            return [printable(name) for name in self.class_ids]
        from timm.data import ImageNetInfo
        info = ImageNetInfo("imagenet-22k")
        known = {*info.label_names()}
        return [info.label_name_to_description(name) if name in known else name for name in self.class_ids]


def printable(name: str) -> str:
    """A file's name with replacement characters for what is not UTF-8, and could be neither drawn nor encoded."""
    return os.fsencode(name).decode("utf-8", "replace")


def balanced_part(targets: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted indices of a fixed, class-balanced part: of each class round(fraction * its size), at least one."""
    order = np.argsort(targets, kind="stable")  # class by class
    classes, starts = np.unique(targets[order], return_index=True)
    chosen = []
    for target, members in zip(classes.tolist(), np.split(order, starts[1:]), strict=True):
        shuffled = np.random.default_rng(stable_hash("part", seed, target)).permutation(len(members))
        chosen.append(members[shuffled[:max(1, round(fraction * len(members)))]])
    return np.sort(np.concatenate(chosen))
