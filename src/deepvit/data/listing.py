"""The image files below folders of classes: which there are, in order, and what is left out and why."""

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from torchvision.datasets.folder import IMG_EXTENSIONS

from deepvit.errors import UserError

EXTENSIONS = tuple(extension.encode() for extension in IMG_EXTENSIONS)
KINDS = " ".join(IMG_EXTENSIONS)
PIECE = 2**12  # names


def entries(folder: Path | bytes) -> list[os.DirEntry]:
    """What is in a folder, in no order. Raises UserError where it cannot be read."""
    with _readable(folder), os.scandir(folder) as found:
        return list(found)


def is_folder(entry: os.DirEntry) -> bool:
    """Links are followed; one that leads to itself or to what cannot be reached is no folder."""
    return _holds(entry.is_dir)


def leads_nowhere(entry: os.DirEntry) -> bool:
    """Whether it is a link to nothing, to itself, or to what cannot be reached."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def _holds(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except OSError:
        return False


@dataclass
class Walk:
    """Image files below folders; `left_out` counts the others by reason.

    Links are followed, hidden files and folders left out, extensions are torchvision's.
    """

    left_out: Counter[str] = field(default_factory=Counter)
    changed: dict[str, int] = field(default_factory=dict)  # folder -> time of its last change, ns

    def images(self, folder: bytes, prefix: bytes = b"", above: frozenset[tuple[int, int]] = frozenset()
               ) -> Iterator[bytes]:
        """Their paths below `folder`, behind `prefix`; `above`: device and inode of the folders above."""
        status = _status(folder)
        here = status.st_dev, status.st_ino
        if here in above:
            self.left_out["link to a folder above itself"] += 1
            return
        self.changed[os.fsdecode(folder)] = status.st_mtime_ns
        for entry in entries(folder):
            name = entry.name
            if not is_folder(entry):
                if self.is_image(entry):
                    yield prefix + name
            elif name.startswith(b"."):
                self.left_out["hidden folder"] += 1
            else:
                yield from self.images(entry.path, prefix + name + b"/", above | {here})

    def is_image(self, entry: os.DirEntry) -> bool:
        """Whether a file counts as an image; one that cannot be reached does, and is a bad one."""
        extension = os.path.splitext(entry.name)[1].lower()
        is_image, is_hidden = extension in EXTENSIONS, entry.name.startswith(b".")
        if is_image and not is_hidden and (_holds(entry.is_file) or not os.path.exists(entry.path)):
            return True
        if is_hidden:
            self.left_out["hidden"] += is_image
        elif is_image:
            self.left_out["no regular file"] += 1
        elif leads_nowhere(entry):
            self.left_out["link that leads nowhere"] += 1
        else:
            self.left_out[os.fsdecode(extension) or "without extension"] += 1
        return False


def _status(folder: Path | bytes) -> os.stat_result:
    with _readable(folder):
        return os.stat(folder)


@contextmanager
def _readable(folder: Path | bytes) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"The folder {os.fsdecode(folder)} cannot be read ({error.strerror}): mend or remove it."
                        ) from error


@dataclass(frozen=True)
class Listing:
    """Files `<class folder>/<name>` in arrays, since Python objects would be copied into every worker."""

    text: np.ndarray  # uint8, the names end to end, each relative to its class folder
    starts: np.ndarray  # int64 [n + 1], where each begins in `text`
    places: np.ndarray  # int64 [n], number of its class folder
    left_out: Mapping[str, int]  # reason -> files and folders
    is_nested: bool  # no class folder has images itself, only folders of them
    changed: Mapping[str, int]  # folder, relative to the listed one -> time of its last change, ns

    def __len__(self) -> int:
        return len(self.places)

    def name(self, row: int) -> bytes:
        return self.text[self.starts[row]:self.starts[row + 1]].tobytes()

    def find(self, place: int, name: bytes) -> int | None:
        """The row of a name in a class folder."""
        first, end = (int(row) for row in np.searchsorted(self.places, [place, place + 1]))
        row = first + bisect_left(range(first, end), name, key=self.name)
        return row if row < end and self.name(row) == name else None

    def padded(self, rows: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """The names of `rows`, each with zeros to the length of the longest name of all; uint8 [k, width] a piece."""
        width = max(int(np.diff(self.starts[at:at + PIECE + 1]).max()) for at in range(0, len(self), PIECE))
        columns = np.arange(width, dtype=np.int32)
        for at in range(0, len(rows), PIECE):  # in pieces: a rank has little memory of its own beside the index
            some = np.asarray(rows[at:at + PIECE])
            starts, ends = self.starts[some], self.starts[some + 1]
            low, high = starts.min(), ends.max()
            piece = np.concatenate([self.text[low:high], np.zeros(width, np.uint8)])
            yield sliding_window_view(piece, width)[starts - low] * (columns < (ends - starts)[:, None])


def list_images(folder: Path, classes: Sequence[str]) -> Listing:
    """Image files below each class folder, sorted by name within it. Raises UserError for a class without images."""
    walk, names, counts = Walk(), [], []
    around = [*map(_status, (folder, *folder.resolve().parents))]
    above = frozenset((status.st_dev, status.st_ino) for status in around)
    walk.changed[str(folder)] = around[0].st_mtime_ns
    for name in classes:
        found = sorted(walk.images(os.fsencode(folder / name), above=above))
        if not found:
            raise UserError(f"The class folder {folder / name} has no images ({KINDS}): add some or remove it. "
                            f"{in_words(walk.left_out)}".rstrip())
        names += found
        counts.append(len(found))
    for entry in entries(os.fsencode(folder)):
        if is_folder(entry):
            walk.left_out["hidden folder"] += entry.name.startswith(b".")
        elif walk.is_image(entry):
            walk.left_out["beside the class folders"] += 1
    text = np.frombuffer(b"".join(names), np.uint8)
    starts = np.cumsum([0, *map(len, names)], dtype=np.int64)
    return Listing(text, starts, np.repeat(np.arange(len(classes)), counts), +walk.left_out,
                   all(b"/" in name for name in names),
                   {os.path.relpath(name, folder): changed for name, changed in walk.changed.items()})


def in_words(left_out: Mapping[str, int]) -> str:
    """`3 are left out: 2 .gif, 1 hidden.`, or nothing."""
    if not left_out:
        return ""
    parts = ", ".join(f"{count} {reason}" for reason, count in Counter(left_out).most_common())
    total = sum(left_out.values())
    return f"{total:,} {'is' if total == 1 else 'are'} left out: {parts}."
