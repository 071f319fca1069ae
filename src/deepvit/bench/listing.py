"""Starting on a large folder of images: listed anew, and from the index that is kept of it."""

import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from deepvit.data.imageset import FileSet
from deepvit.data.listing import Listing, list_images, open_index, write_index

IMAGENET, CLASSES = 1_281_167, 1000
RANKS = 8  # of the node whose memory is counted


def measure(images: int = IMAGENET, files: int = 100_000) -> list[dict]:
    """Rows with `case`, `name`, `ms`, and of the index `mb_node`: its file, once, and what 8 ranks have for themselves.

    Args:
        images: names of a simulated tree, of which only the class folders exist.
        files: small files that are made, listed and removed.
    """
    with tempfile.TemporaryDirectory() as place:
        folder, path = Path(place) / "train", Path(place) / "simulated.index"
        classes = [f"n{number:08d}" for number in range(min(CLASSES, files))]
        for name in classes:
            (folder / name).mkdir(parents=True)
        write_index(path, simulated(folder, classes, images))
        ms, own = _apart(path, folder, classes)
        rows = [{"name": f"{images:,} names from the index", "ms": ms,
                 "mb_node": path.stat().st_size / 1e6 + RANKS * own}]
        for number in range(files):
            (folder / classes[number % len(classes)] / f"{number}.jpg").touch()
        start = time.perf_counter()
        write_index(path, list_images(folder, classes))
        rows.append({"name": f"{files:,} files listed and kept", "ms": 1e3 * (time.perf_counter() - start)})
        rows.append({"name": f"{files:,} files from the index", "ms": _apart(path, folder, classes)[0]})
    return [{"case": "listing", **row} for row in rows]


def simulated(folder: Path, classes: list[str], images: int) -> Listing:
    """As of `images` files with names like ImageNet's, evenly over the class folders."""
    places = np.sort(np.arange(images) % len(classes))
    names = [f"{classes[place]}_{number % 20_000}.JPEG".encode() for number, place in enumerate(places)]
    changed = {name: os.stat(folder / name).st_mtime_ns for name in classes}
    starts = np.cumsum([0, *map(len, names)])
    return Listing(np.frombuffer(b"".join(names), np.uint8), starts, places, {}, False, changed)


def _apart(path: Path, folder: Path, classes: list[str]) -> tuple[float, float]:
    """(ms, MB of its own) of a new process that opens the set, asks for 1,000 names and for the fingerprint."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_start, path, folder, classes).result()


def _start(path: Path, folder: Path, classes: list[str]) -> tuple[float, float]:
    before, start = _own_mb(), time.perf_counter()
    images = FileSet(folder, classes, open_index(path, folder), decoder="pil")
    for number in np.linspace(0, len(images) - 1, num=1000, dtype=np.int64).tolist():
        images.name(number)
    images.fingerprint()
    return 1e3 * (time.perf_counter() - start), _own_mb() - before


def _own_mb() -> float:
    """Memory that this process shares with no other, MB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) * 1024 / 1e6
