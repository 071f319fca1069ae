"""Sets that live on the device: for given draws timm's rectangles and the loader's pixels; the draws' distribution."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import soak
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from scipy import stats
from timm.data import random_erasing as timm_erasing
from timm.data import transforms as timm_transforms

import deepvit.data as data
from deepvit.data.draws import Draws
from deepvit.data.imageset import ArraySet
from deepvit.data.on_device import NOISE, Rectangles
from deepvit.data.randomness import Uniforms, generators_kept
from deepvit.data.stream import draw
from deepvit.data.transforms import crop, resize
from deepvit.errors import UserError

CPU = torch.device("cpu")
ALL = {"crop_scale": (0.2, 1.0), "hflip": 0.5, "vflip": 0.3, "color_jitter": None, "random_erasing": 0.6,
       "erasing_count": 3}


def grain(n: int = 23, height: int = 12, width: int = 10) -> ArraySet:
    """Every third image in full black and white alone."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    pixels[::3] = (pixels[::3] > 127) * 255
    return ArraySet(pixels, np.arange(n) % 5, "grain")


def transform(size: int = 8, **augment) -> data.Transform:
    return data.train_transform(size, **{**ALL, **augment})


def kept(images: ArraySet, chosen: data.Transform, device: torch.device = CPU, max_mb: int = 512) -> data.OnDevice:
    return data.OnDevice(images, chosen, seed=3, device=device, max_mb=max_mb)


def run(images: data.OnDevice, **options) -> list[list[data.Batch]]:
    return list(images.train_batches(**{"batch_size": 8, "steps": 7, **options}))


def samples(n: int) -> Uniforms:
    return Uniforms(0, np.zeros(n, np.int64), np.arange(n), np.zeros(n, np.int64))


# The same pixels

@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
@pytest.mark.parametrize(("height", "width", "size"), [(12, 10, 8), (32, 32, 32), (9, 30, 24), (60, 50, 12)])
def test_pixels_are_the_loaders_for_the_same_crop_and_flips(height, width, size, interpolation):
    images = grain(16, height, width)
    made = kept(images, transform(size, interpolation=interpolation))
    for step, (batch,) in enumerate(run(made, batch_size=16)):
        drawn = draw(16, 3, step, np.arange(16), 16)
        boxes = made.draws.crops(Uniforms(3, drawn.epochs, drawn.indices, drawn.repeats))
        for row, (top, left, high, wide, kind, flips) in enumerate(boxes.tolist()):
            image = crop(images.picture(int(drawn.indices[row])), top, left, high, wide)
            image = resize(image, (size, size), made.crop.names[kind])
            image = TF.hflip(image) if flips % 2 else image
            assert torch.equal(batch.images[row], TF.vflip(image) if flips >= 2 else image)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_without_a_random_crop_it_is_the_evaluations():
    """Of images of any size; flips remain."""
    images = grain()
    made = kept(images, transform(crop_scale=None, crop_pct=0.8, hflip=1.0, vflip=0.0))
    evaluation = data.eval_transform(8, 0.8)
    for batch, in run(made):
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            assert torch.equal(image, TF.hflip(evaluation(images.picture(index))[0]))


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_writes_what_torchvisions_does(mode):
    made = kept(grain(), transform(erasing_mode=mode))
    prepare, written = data.Prepare(*data.norm_values("half"), 5), []
    for step, (batch,) in enumerate(run(made)):
        x, plain = (prepare(batch, step, "cpu", training)[0] for training in (True, False))
        for row, expected in enumerate(plain):
            values = batch.erasures.values[row].expand(-1, 3, 8, 8)
            for (top, left, height, width), patch in zip(batch.erasures.places[row].tolist(), values, strict=True):
                part = patch[:, top:top + height, left:left + width]
                expected = TF.erase(expected, top, left, height, width, part)
                written += part[:, :1, :1].flatten().tolist() if mode == "rand" and part.numel() else \
                    part.flatten().tolist()
            assert torch.equal(x[row], expected)
        assert x.is_contiguous(memory_format=torch.channels_last)
    assert len(written) > 200
    assert set(written) == {0.0} if mode == "const" else stats.kstest(written, "norm").pvalue > 1e-3


# The same rectangles: timm's, fed with the numbers that ours are made of

class Feed:
    """Stands for Python's `random` within timm: `tries` in pairs for sides, then `places`."""

    def __init__(self, first: list[float], tries: np.ndarray, places: np.ndarray):
        self.first, self.tries, self.places = first, iter(tries.ravel()), iter(places)

    def random(self) -> float:
        return self.first.pop(0)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self.tries)

    def randint(self, low: int, high: int) -> int:
        return low + int((high - low + 1) * (self.first.pop(0) if self.first else next(self.places)))


@pytest.mark.parametrize(("whole", "scale", "ratio"), [
    ((32, 32), (0.6, 1.0), (3 / 4, 4 / 3)), ((12, 10), (0.02, 1.0), (0.2, 5.0)), ((7, 40), (0.5, 1.0), (0.9, 1.2)),
    ((1, 2), (0.05, 1.0), (3 / 4, 4 / 3))])
def test_crops_are_timms(monkeypatch, whole, scale, ratio):
    draws = Draws(transform(crop_scale=scale, crop_ratio=ratio), whole)
    boxes = draws.crops(samples(500))[:, :4].tolist()
    numbers = samples(500)
    tries, places = numbers.take(10, 2), numbers.take(2)
    for row, box in enumerate(boxes):
        monkeypatch.setattr(timm_transforms, "random", Feed([], tries[row], places[row]))
        top, left, height, width = draws.crop.get_params(torch.empty(1).expand(1, *whole), scale, ratio)
        assert box == [min(top, whole[0] - 1), min(left, whole[1] - 1), max(height, 1), max(width, 1)]


@pytest.mark.parametrize("count", [1, 3])
def test_erasures_are_timms(monkeypatch, count):
    draws = Draws(transform(16, erasing_count=count), (16, 16))
    places = draws.erasures(samples(500))
    assert places.shape == (500, count, 4)
    numbers, erased = samples(500), 0
    first = numbers.take(2)
    parts = [(numbers.take(10, 2), numbers.take(2)) for _ in range(count)]
    for row in range(500):
        tries = np.concatenate([part[0][row] for part in parts])
        feed = Feed(first[row].tolist(), tries, np.concatenate([part[1][row] for part in parts]))
        feed.first = feed.first if count > 1 else feed.first[:1]
        monkeypatch.setattr(timm_erasing, "random", feed)
        if all(_fits_at_once(part[0][row]) for part in parts):
            expected = draws.erasing(torch.ones(3, 16, 16))
