"""The image files below folders of classes, and the index in which a long listing is kept for the next start: a file in
`$XDG_CACHE_HOME/deepvit` or `~/.cache/deepvit` that all processes of a machine map. One of them makes it; it may be
deleted at any time. It holds while no listed folder has a new time of change: files that are added, removed or renamed
are seen, new content is not."""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from torchvision.datasets.folder import IMG_EXTENSIONS

from deepvit.errors import UserError

EXTENSIONS = tuple(extension.encode() for extension in IMG_EXTENSIONS)
KINDS = " ".join(IMG_EXTENSIONS)
PIECE = 2**12  # names
MANY = 20_000  # images, about: fewer are listed in 0.2 s and not kept
TICK = 2 * 10**9  # ns; a folder that changed so recently may have changed again without another time
ALIGNED = 64  # bytes
VERSION = 1
log = logging.getLogger(__name__)


def entries(folder: Path | bytes) -> list[os.DirEntry]:
    """What is in a folder, in no order. Raises UserError where it cannot be read."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError as error:
        raise UserError(f"Folder {os.fsdecode(folder)} cannot be read ({error.strerror}): fix or remove it.") from error


def is_folder(entry: os.DirEntry) -> bool:
    """Links are followed; one that leads to itself or to what cannot be reached is no folder."""
    return entry.is_dir(follow_symlinks=False) or entry.is_symlink() and os.path.isdir(entry.path)


def is_dead_link(entry: os.DirEntry) -> bool:
    """Whether it is a link to nothing, to itself, or to what cannot be reached."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def existing(root: str | None, source: str) -> Path:
    """The data folder, or a UserError that says what is wrong with it."""
    if not root:
        raise UserError(f"data={source} needs the folder of the images: give data.root=/path/to/it.")
    path = Path(root).expanduser()
    if not path.is_dir():
        fault = "is a file, not a folder of images" if path.exists() else "does not exist"
        raise UserError(f"data.root={root} {fault}.")
    entries(path)
    return path


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder` but for hidden ones, in `class_order`."""
    found = [entry for entry in entries(folder) if not entry.name.startswith(".")]
    for entry in found:
        if is_dead_link(entry):
            raise UserError(f"The link {entry.path} leads nowhere, but may be meant as a class: fix or remove it.")
    return class_order(entry.name for entry in found if is_folder(entry))


def class_order(names: Iterable[str]) -> list[str]:
    """Sorted, each once; by number where all are numbers (ImageNet-V2)."""
    found = sorted({*names})
    return sorted(found, key=int) if all(map(str.isdecimal, found)) else found


@dataclass
class Walk:
    """Image files below folders, by torchvision's extensions, links followed; `left_out` counts others by reason."""

    left_out: Counter[str] = field(default_factory=Counter)
    changed: dict[str, int] = field(default_factory=dict)  # folder -> time of its last change, ns

    def images(self, folder: bytes, prefix: bytes = b"", above: frozenset[tuple[int, int]] = frozenset()
               ) -> Iterator[bytes]:
        """Their paths below `folder`, after `prefix`; `above`: device and inode of the folders above."""
        status = os.stat(folder)
        here = status.st_dev, status.st_ino
        if here in above:
            self.left_out["link to a folder above itself"] += 1
            return
        self.changed[os.fsdecode(folder)] = status.st_mtime_ns
        for entry in entries(folder):
            if not is_folder(entry):
                if self.is_image(entry):
                    yield prefix + entry.name
            elif entry.name.startswith(b"."):
                self.left_out["hidden folder"] += 1
            else:
                yield from self.images(entry.path, prefix + entry.name + b"/", above | {here})

    def is_image(self, entry: os.DirEntry) -> bool:
        """Whether a file counts as an image; a dead link does, and is a bad one."""
        extension = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith(b"."):
            self.left_out["hidden"] += extension in EXTENSIONS
        elif extension not in EXTENSIONS:
            dead = is_dead_link(entry)
            self.left_out["link that leads nowhere" if dead else os.fsdecode(extension) or "without extension"] += 1
        elif entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path) or not os.path.exists(entry.path):
            return True
        else:
            self.left_out["no regular file"] += 1
        return False


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

    def padded(self, rows: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """The names of `rows`, each with zeros to the length of the longest name of all; uint8 [k, width] a piece."""
        width = max(int(np.diff(self.starts[at:at + PIECE + 1]).max()) for at in range(0, len(self), PIECE))
        columns = np.arange(width, dtype=np.int32)
        for at in range(0, len(rows), PIECE):  # in pieces, so that a rank takes little memory beside the index
            some = np.asarray(rows[at:at + PIECE])
            starts, ends = self.starts[some], self.starts[some + 1]
            low, high = starts.min(), ends.max()
            piece = np.concatenate([self.text[low:high], np.zeros(width, np.uint8)])
            yield sliding_window_view(piece, width)[starts - low] * (columns < (ends - starts)[:, None])


def list_images(folder: Path, classes: Sequence[str]) -> Listing:
    """Image files below each class folder, sorted by name within it. Raises UserError for a class without images."""
    walk, names, counts = Walk(), [], []
    around = [os.stat(one) for one in (folder, *folder.resolve().parents)]
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
    return Listing(np.frombuffer(b"".join(names), np.uint8), np.cumsum([0, *map(len, names)], dtype=np.int64),
                   np.repeat(np.arange(len(classes)), counts), +walk.left_out, all(b"/" in name for name in names),
                   {os.path.relpath(name, folder): changed for name, changed in walk.changed.items()})


def in_words(left_out: Mapping[str, int]) -> str:
    """`3 are left out: 2 .gif, 1 hidden.`, or nothing."""
    parts = ", ".join(f"{count} {reason}" for reason, count in Counter(left_out).most_common() if count)
    total = sum(left_out.values())
    return f"{total:,} {'is' if total == 1 else 'are'} left out: {parts}." if total else ""


def log_left_out(where: Path | str, left_out: Mapping[str, int]) -> None:
    if words := in_words(left_out):
        log.warning("In %s %s Images are %s.", where, words, KINDS)


def kept_listing(folder: Path, classes: Sequence[str]) -> Listing:
    """`list_images`; where there are many, mapped from an index, which the first process makes while others wait."""
    if not _are_many(folder, classes):
        return list_images(folder, classes)
    path = index_path(folder, classes)
    if found := open_index(path, folder):
        return found
    with ExitStack() as stack:
        with suppress(OSError):  # where locks cannot be had, each process lists for itself
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(f"{path}.lock", "a")), fcntl.LOCK_EX)
        if found := open_index(path, folder):
            return found
        log.info("Listing the images of %s%s.", folder, " again, which has changed" if path.exists() else "")
        began, listing = time.time_ns(), list_images(folder, classes)
        if max(listing.changed.values()) > began - TICK:
            return listing
        try:
            write_index(path, listing)
        except OSError as error:
            log.info("The list cannot be kept in %s (%s): it is made again at each start.", path.parent, error.strerror)
        return open_index(path, folder) or listing


def _are_many(folder: Path, classes: Sequence[str]) -> bool:
    """Judged by eight of the classes; one with folders in it may hold any number."""
    sample = [entries(folder / name) for name in classes[::max(1, len(classes) // 8)]]
    return any(entry.is_dir(follow_symlinks=False) for found in sample for entry in found) \
        or sum(map(len, sample)) * len(classes) >= MANY * len(sample)


def index_path(folder: Path, classes: Sequence[str]) -> Path:
    """Where the index of a folder lies; the inode distinguishes the disks of machines that share a home."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    words = (os.path.realpath(folder), str(folder.stat().st_ino), *classes)
    return cache / "deepvit" / f"{hashlib.blake2b(os.fsencode('/'.join(words)), digest_size=12).hexdigest()}.index"


def open_index(path: Path, folder: Path) -> Listing | None:
    """What `write_index` wrote, mapped; None where it is missing, damaged or out of date."""
    try:
        with path.open("rb") as file:
            header, begin = json.loads(file.readline()), file.tell()
        if header["version"] != VERSION or any(os.stat(folder / name).st_mtime_ns != changed
                                               for name, changed in header["changed"].items()):
            return None
        content = np.asarray(np.memmap(path, np.uint8, "r", begin))
        counts = np.cumsum([8 * (header["n"] + 1), 8 * header["n"], header["bytes"]])
        starts, places, text, rest = np.split(content, counts)
        if len(rest) or len(text) != header["bytes"]:
            return None
        return Listing(text, starts.view(np.int64), places.view(np.int64), header["left_out"], header["is_nested"],
                       header["changed"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_index(path: Path, listing: Listing) -> None:
    """Whole or not at all. Raises OSError where it cannot be written."""
    header = json.dumps({"version": VERSION, "n": len(listing), "bytes": len(listing.text),
                         "left_out": listing.left_out, "is_nested": listing.is_nested, "changed": listing.changed})
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(header.encode().ljust(-(-(len(header) + 1) // ALIGNED) * ALIGNED - 1) + b"\n")
            for array in (listing.starts, listing.places, listing.text):
                array.tofile(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
