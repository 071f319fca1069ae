"""Images per second and core: ours against timm's transforms on the same files, interleaved in one process."""

import io
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import Compose

from deepvit.bench.timing import Call, interleaved, paired
from deepvit.data.decode import decode
from deepvit.data.stream import generators_kept, seed_sample
from deepvit.data.transforms import eval_transform, mend_posterize, train_transform
from deepvit.errors import UserError

SIZE, MOST_FILES, ROUND = 224, 200, 20  # pixels, images, images timed in a row
RECIPE = "rand-m9-mstd0.5-inc1"
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


@dataclass(frozen=True)
class Contender:
    """One way from a file's bytes to an array of 224 x 224, in a task shared with its peers."""

    task: str
    name: str
    make: Callable[[bytearray], torch.Tensor]


def contenders() -> list[Contender]:
    """timm first in each task: as its plain loader (floats) and as its prefetching loader (uint8) do it."""
    found = []
    for task, policy in (("decode + crop + flip", None), ("full recipe", RECIPE)):
        augment = {"auto_augment": policy, "color_jitter": None}
        for name, prefetch in (("timm", False), ("timm, prefetching loader", True)):
            theirs = create_transform(SIZE, is_training=True, interpolation="random", use_prefetcher=prefetch,
                                      re_prob=0.25 if policy else 0.0, re_mode="pixel", **augment, **HALF)
            found.append(Contender(task, name, _timm(theirs)))
        ours = train_transform(SIZE, random_erasing=0.25 if policy else 0.0, **augment)
        found += [Contender(task, f"deepvit, {decoder}", _ours(ours, decoder)) for decoder in ("pil", "torchvision")]
    theirs = create_transform(SIZE, crop_pct=0.9, interpolation="bicubic", use_prefetcher=True)
    found.append(Contender("evaluation", "timm, prefetching loader", _timm(theirs)))
    found += [Contender("evaluation", f"deepvit, {decoder}", _ours(eval_transform(SIZE), decoder))
              for decoder in ("pil", "torchvision")]
    return found


def measure(folder: str, seconds: float = 60.0) -> list[dict]:
    """Rows with `task`, `name`, `images_per_s` (median over rounds, per core: CPU time), `spread` (its quartiles),
    `ratio` to the first row of the task with `pairs` and `waited` (`timing.paired`), and `difference` to PIL (mean over
    pixels, of 255; tasks without a PIL-only stage that amplifies rounding).

    folder: any folder of JPEGs; up to 200 are held in memory, so that the disk is not measured.
    """
    files = _files(folder)
    candidates, threads = contenders(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with generators_kept():
            times = interleaved({one: _step(one, files) for one in candidates}, "cpu", seconds)
            differences = _differences(files)
    finally:
        torch.set_num_threads(threads)
    return _rows(times, differences)


def _files(folder: str) -> list[bytearray]:
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise UserError(f"{folder} holds no JPEGs to time the loader on.")
    chosen = paths[::max(1, len(paths) // MOST_FILES)][:MOST_FILES]
    return [bytearray(path.read_bytes()) for path in chosen]


def _step(contender: Contender, files: list[bytearray]) -> Callable[[], None]:
    """Makes ROUND images, each time others; of the same files and seeds for all contenders."""
    turns = itertools.count()

    def step() -> None:
        turn = next(turns)
        for place in range(turn * ROUND, (turn + 1) * ROUND):
            seed_sample(0, turn, place % len(files), 0)
            contender.make(files[place % len(files)])

    return step


def _differences(files: list[bytearray]) -> dict[str, float]:
    """Mean absolute difference between our two decoders on the same draws, of 255."""
    crop = train_transform(SIZE, color_jitter=None)
    result = {}
    for task, transform in (("decode + crop + flip", crop), ("evaluation", eval_transform(SIZE))):
        errors = []
        for index, data in enumerate(files):
            seed_sample(1, 0, index, 0)
            slow = _ours(transform, "pil")(data).float()
            seed_sample(1, 0, index, 0)
            errors.append((slow - _ours(transform, "torchvision")(data).float()).abs().mean().item())
        result[task] = float(np.mean(errors))
    return result


def _rows(times: dict[Contender, list[Call]], differences: dict[str, float]) -> list[dict]:
    rows, base = [], {}
    for one, calls in times.items():
        low, rate, high = statistics.quantiles([ROUND / call.computed for call in calls], n=4)
        fast = one.name == "deepvit, torchvision"
        rows.append({"task": one.task, "name": one.name, "images_per_s": rate, "spread": [low, high],
                     **paired(base.setdefault(one.task, calls), calls),
                     "difference": differences.get(one.task) if fast else None})
    return rows


def _timm(transform: Compose) -> Callable[[bytearray], torch.Tensor]:
    for step in transform.transforms:
        mend_posterize(step)  # or timm itself stops under Pillow 13
    return lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB"))


def _ours(transform: Callable, decoder: str) -> Callable[[bytearray], torch.Tensor]:
    return lambda data: transform(decode(data, decoder)[0])[0]
