"""Listings of many images kept as files, which all processes of a machine map: one of them lists, once.

An index lies in the user's cache folder, `$XDG_CACHE_HOME/deepvit` or `~/.cache/deepvit`, and may be deleted at any
time.
It holds as long as no folder that was listed has another time of change. So files that come, go or get another name are
seen, in any folder; a file whose content changes is not, nor need it be: a listing holds names alone.
"""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from deepvit.data.listing import Listing, entries, list_images

MANY = 20_000  # images, about: fewer are listed in 0.2 s and not kept
TICK = 2 * 10**9  # ns; a folder that changed so recently may have changed again without another time
ALIGNED = 64  # bytes
VERSION = 1
log = logging.getLogger(__name__)


def kept_listing(folder: Path, classes: Sequence[str]) -> Listing:
    """`list_images`; where there are many, mapped from an index, which the first process makes while others wait."""
    if not _are_many(folder, classes):
        return list_images(folder, classes)
    path = index_path(folder, classes)
    found = open_index(path, folder)
    if found is None:
        with _locked(path):
            found = open_index(path, folder) or _build(path, folder, classes)
    return found


def index_path(folder: Path, classes: Sequence[str]) -> Path:
    """Where the index of a folder lies; the inode tells the disks of machines that share a home apart."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    words = (os.path.realpath(folder), str(folder.stat().st_ino), *classes)
    return cache / "deepvit" / f"{hashlib.blake2b(os.fsencode('/'.join(words)), digest_size=12).hexdigest()}.index"


def open_index(path: Path, folder: Path) -> Listing | None:
    """What `write_index` wrote, mapped; None where there is nothing, or nothing that holds."""
    try:
        with path.open("rb") as file:
            header, begin = json.loads(file.readline()), file.tell()
        if header["version"] != VERSION or any(os.stat(folder / name).st_mtime_ns != changed
                                               for name, changed in header["changed"].items()):
            return None
        content = np.asarray(np.memmap(path, np.uint8, "r", begin))
        counts = np.cumsum([8 * (header["n"] + 1), 8 * header["n"], header["bytes"]])
        starts, places, text, rest = np.split(content, counts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if len(rest) or len(text) != header["bytes"]:
        return None
    return Listing(text, starts.view(np.int64), places.view(np.int64), header["left_out"], header["is_nested"],
                   header["changed"])


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
        with suppress(OSError):
            aside.unlink()


def _build(path: Path, folder: Path, classes: Sequence[str]) -> Listing:
    log.info("Listing the images of %s%s.", folder, " again, which has changed" if path.exists() else "")
    began = time.time_ns()
    listing = list_images(folder, classes)
    if max(listing.changed.values()) > began - TICK:
        return listing
    try:
        write_index(path, listing)
    except OSError as error:
        log.info("The list cannot be kept in %s (%s): each start will list them again.", path.parent, error.strerror)
    return open_index(path, folder) or listing


def _are_many(folder: Path, classes: Sequence[str]) -> bool:
    """By eight of the classes; one with folders in it may hold any number."""
    sample = [entries(folder / name) for name in classes[::max(1, len(classes) // 8)]]
    if any(entry.is_dir(follow_symlinks=False) for found in sample for entry in found):
        return True
    return sum(map(len, sample)) * len(classes) >= MANY * max(1, len(sample))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; where locks cannot be had, all at once, each for itself."""
    with ExitStack() as stack:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(f"{path}.lock", "a")), fcntl.LOCK_EX)
        yield
