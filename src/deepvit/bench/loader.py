"""Images per second and core: ours against timm's transforms on the same files, interleaved in one process."""

import io
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import Compose

from deepvit.bench.timing import interleaved, paired
from deepvit.data.decode import decode
from deepvit.data.stream import generators_kept, seed_sample
from deepvit.data.transforms import eval_transform, mend_posterize, train_transform
from deepvit.errors import UserError

SIZE, MOST_FILES, ROUND = 224, 200, 20  # pixels, images, images timed in a row
CROP, FULL, EVALUATION = "decode + crop + flip", "full recipe", "evaluation"
DECODERS = "pil", "torchvision"
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}

Maker = Callable[[bytearray], Tensor]  # a file's bytes -> the image [3, 224, 224]


def measure(data: str, seconds: float = 60.0) -> Iterator[dict]:
    """Rows with `case`, `name`, `images_per_s` (median over rounds, per core: CPU time), `spread` (its quartiles), what
    `timing.paired` says of the case's first row against it, and `difference` to PIL (mean over pixels, of 255; in cases
    without a PIL-only stage that amplifies rounding). data: a folder of JPEGs, 200 of which are held in memory."""
    paths = sorted(path for path in Path(data).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise UserError(f"{data} holds no JPEGs to time the loader on.")
    files = [bytearray(path.read_bytes()) for path in paths[::max(1, len(paths) // MOST_FILES)][:MOST_FILES]]
    threads, makers = torch.get_num_threads(), contenders()
    torch.set_num_threads(1)
    try:
        with generators_kept():
            times = interleaved({key: _step(make, files) for key, make in makers.items()}, "cpu", seconds)
            differences = _differences(makers, files)
    finally:
        torch.set_num_threads(threads)
    base = {}
    for (case, name), calls in times.items():
        low, rate, high = statistics.quantiles([ROUND / call.computed for call in calls], n=4)
        yield {"case": case, "name": name, "images_per_s": rate, "spread": [low, high],
               **paired(base.setdefault(case, calls), calls),
               "difference": differences.get(case) if name == "deepvit, torchvision" else None}


def contenders() -> dict[tuple[str, str], Maker]:
    """(case, name) -> a way to make an image; timm first, by its plain loader (floats), its prefetching one (uint8)."""
    found = {}
    for case, policy in ((CROP, None), (FULL, "rand-m9-mstd0.5-inc1")):
        augment = {"auto_augment": policy, "color_jitter": None}
        for name, prefetch in (("timm", False), ("timm, prefetching loader", True)):
            found[case, name] = _timm(create_transform(
                SIZE, is_training=True, interpolation="random", use_prefetcher=prefetch,
                re_prob=0.25 if policy else 0.0, re_mode="pixel", **augment, **HALF))
        ours = train_transform(SIZE, random_erasing=0.25 if policy else 0.0, **augment)
        found |= {(case, f"deepvit, {decoder}"): _ours(ours, decoder) for decoder in DECODERS}
    found[EVALUATION, "timm, prefetching loader"] = _timm(create_transform(
        SIZE, crop_pct=0.9, interpolation="bicubic", use_prefetcher=True))
    return found | {(EVALUATION, f"deepvit, {decoder}"): _ours(eval_transform(SIZE), decoder) for decoder in DECODERS}


def _timm(transform: Compose) -> Maker:
    for step in transform.transforms:
        mend_posterize(step)  # or timm itself stops under Pillow 13
    return lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB"))


def _ours(transform: Callable, decoder: str) -> Maker:
    return lambda data: transform(decode(data, decoder)[0])[0]


def _step(make: Maker, files: list[bytearray]) -> Callable[[], None]:
    """Makes the next ROUND images at each call, of the same files and seeds for all contenders."""
    turns = itertools.count()

    def step() -> None:
        turn = next(turns)
        for place in range(turn * ROUND, (turn + 1) * ROUND):
            seed_sample(0, turn, place % len(files), 0)
            make(files[place % len(files)])

    return step


def _differences(makers: dict[tuple[str, str], Maker], files: list[bytearray]) -> dict[str, float]:
    """Mean absolute difference between our two decoders on the same draws, of 255."""
    def images(case: str, decoder: str) -> Iterator[Tensor]:
        for index, data in enumerate(files):
            seed_sample(1, 0, index, 0)
            yield makers[case, f"deepvit, {decoder}"](data).float()

    return {case: statistics.fmean(float((one - other).abs().mean()) for one, other in zip(
        *(images(case, decoder) for decoder in DECODERS), strict=True)) for case in (CROP, EVALUATION)}
