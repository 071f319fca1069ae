"""What should start at once: a command's answer, and a large folder of images, by the index kept of it."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from deepvit.bench.timing import apart, summary, timed
from deepvit.data.imageset import FileSet
from deepvit.data.listing import Listing, open_index, write_index
from deepvit.errors import UserError

PROGRAM = Path(__file__).resolve().parents[3] / "train.py"
RUNS = 7
COMMANDS = {"train.py --help": [str(PROGRAM), "--help"],
            "train.py --cfg job": [str(PROGRAM), "model=deepvit32", "--cfg", "job"],
            "python -c 'import deepvit'": ["-c", "import deepvit"]}
IMAGENET, CLASSES = 1_281_167, 1000
RANKS = 8  # of the node whose memory is counted


def commands() -> Iterator[dict]:
    """Rows with `case`, `name`, `ms`, `spread` (quartiles, ms) of whole processes, after a first run of each."""
    if not PROGRAM.exists():
        raise UserError(f"There is no {PROGRAM}: run this bench from a checkout.")
    for name, words in COMMANDS.items():
        start = partial(subprocess.run, [sys.executable, *words], check=True, capture_output=True)
        yield {"case": "start-up", "name": name, **summary([timed(start, "cpu") for _ in range(RUNS + 1)][1:])}


def listing(images: int = IMAGENET) -> list[dict]:
    """A row with `case`, `name`, `ms` and `mb_node`: the index's file, once, and the private memory of 8 ranks; of a
    simulated tree of `images` names, of which only the class folders exist."""
    with tempfile.TemporaryDirectory() as place:
        folder, path = Path(place) / "train", Path(place) / "simulated.index"
        classes = [f"n{number:08d}" for number in range(CLASSES)]
        for name in classes:
            (folder / name).mkdir(parents=True)
        write_index(path, _simulated(folder, classes, images))
        ms, own = apart(_open, path, folder, classes, start="spawn")
        return [{"case": "listing", "name": f"{images:,} names from the index", "ms": ms,
                 "mb_node": path.stat().st_size / 1e6 + RANKS * own}]


def _simulated(folder: Path, classes: list[str], images: int) -> Listing:
    """Files with names like ImageNet's, spread evenly over the class folders."""
    places = np.sort(np.arange(images) % len(classes))
    names = [f"{classes[place]}_{number % 20_000}.JPEG".encode() for number, place in enumerate(places)]
    changed = {name: os.stat(folder / name).st_mtime_ns for name in classes}
    starts = np.cumsum([0, *map(len, names)])
    return Listing(np.frombuffer(b"".join(names), np.uint8), starts, places, {}, False, changed)


def _open(path: Path, folder: Path, classes: list[str]) -> tuple[float, float]:
    """ms and private MB it takes this process to open the set and ask for 1,000 names and the fingerprint."""
    before, start = _private_mb(), time.perf_counter()
    images = FileSet(folder, classes, open_index(path, folder), decoder="pil")
    for number in np.linspace(0, len(images) - 1, num=1000, dtype=np.int64).tolist():
        images.name(number)
    images.fingerprint()
    return 1e3 * (time.perf_counter() - start), _private_mb() - before


def _private_mb() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) * 1024 / 1e6
