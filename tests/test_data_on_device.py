"""Sets that live on the device: for given draws timm's rectangles and the loader's pixels; the draws' distribution."""

import random

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
from deepvit.config.compare import changed
from deepvit.config.settings import read_settings
from deepvit.data.imageset import ArraySet
from deepvit.data.on_device import Draws, Rectangles, Uniforms
from deepvit.data.stream import draw, generators_kept
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
            image = crop(images.image(int(drawn.indices[row])), top, left, high, wide)
            image = resize(image, (size, size), made.draws.crop.names[kind])
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
            assert torch.equal(image, TF.hflip(evaluation(images.image(index))[0]))


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
    assert len(written) > 100
    assert set(written) == {0.0} if mode == "const" else stats.kstest(written, "norm").pvalue > 1e-3


# The same rectangles: timm's, fed with the numbers that ours are made of

class Feed:
    """Stands for Python's `random` within timm. Of each rectangle: ten pairs for its sides, and two for its place."""

    def __init__(self, first: list[float], sides: np.ndarray, places: np.ndarray):
        self.first = first
        self.parts = [(part.ravel().tolist(), place.tolist()) for part, place in zip(sides, places, strict=True)]

    def random(self) -> float:
        return self.first.pop(0)

    def uniform(self, low: float, high: float) -> float:
        if not self.parts[0][0]:  # none of ten fitted
            self.parts.pop(0)
        return low + (high - low) * self.parts[0][0].pop(0)

    def randint(self, low: int, high: int) -> int:
        number = self.first.pop(0) if self.first else self.parts[0][1].pop(0)
        if not self.parts[0][1]:
            self.parts.pop(0)
        return low + int((high - low + 1) * number)


@pytest.mark.parametrize(("whole", "scale", "ratio"), [
    ((32, 32), (0.6, 1.0), (3 / 4, 4 / 3)), ((12, 10), (0.02, 1.0), (0.2, 5.0)), ((7, 40), (0.5, 1.0), (0.9, 1.2)),
    ((1, 2), (0.05, 1.0), (3 / 4, 4 / 3))], ids=str)
def test_crops_are_timms(monkeypatch, whole, scale, ratio):
    draws = Draws(transform(crop_scale=scale, crop_ratio=ratio), whole)
    boxes = draws.crops(samples(400))[:, :4].tolist()
    numbers = samples(400)
    sides, places = numbers.take(1, 10, 2), np.stack([numbers.take(), numbers.take()], axis=1)[:, None]
    for row, box in enumerate(boxes):
        monkeypatch.setattr(timm_transforms, "random", Feed([], sides[row], places[row]))
        top, left, height, width = draws.crop.get_params(torch.empty(1).expand(1, *whole), scale, ratio)
        assert box == [min(top, whole[0] - 1), min(left, whole[1] - 1), max(height, 1), max(width, 1)]


@pytest.mark.parametrize("count", [1, 3])
def test_erasures_are_timms(monkeypatch, count):
    draws = Draws(transform(16, erasing_count=count, erasing_mode="const"), (16, 16))
    erased = Rectangles(torch.from_numpy(draws.erasures(samples(400))), torch.zeros(400, count, 1, 1, 1))
    erased = erased.write(torch.ones(400, 3, 16, 16))
    numbers = samples(400)
    first = np.stack([numbers.take(), numbers.take()], axis=1)[:, :1 if count == 1 else 2]
    parts = [(numbers.take(10, 2), np.stack([numbers.take(), numbers.take()], axis=1)) for _ in range(count)]
    sides, places = (np.stack(part, axis=1) for part in zip(*parts, strict=True))
    for row, ours in enumerate(erased):
        monkeypatch.setattr(timm_erasing, "random", Feed(first[row].tolist(), sides[row], places[row]))
        assert torch.equal(ours, draws.erasing(torch.ones(3, 16, 16)))


# The same distribution

def p_value(one: np.ndarray, other: np.ndarray) -> float:
    """Whether rows of whole numbers come from one distribution: chi-square over those seen at least 20 times."""
    _, kinds = np.unique(np.concatenate([one, other]), axis=0, return_inverse=True)
    table = np.stack([np.bincount(part, minlength=kinds.max() + 1) for part in np.split(kinds.ravel(), [len(one)])])
    often = table.sum(0) >= 20
    table = np.column_stack([table[:, often], table[:, ~often].sum(1)])
    return stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue


def test_crops_flips_and_erasures_are_distributed_as_the_loaders():
    n, chosen = 20_000, transform(12, erasing_count=2)
    draws, u = Draws(chosen, (12, 10)), samples(20_000)
    crops, erasures = draws.crops(u), draws.erasures(u)
    across, down = crops[:, 5] % 2, crops[:, 5] // 2
    assert all(stats.binomtest(int(flips.sum()), n, p).pvalue > 1e-3 for flips, p in ((across, 0.5), (down, 0.3)))
    assert p_value(across[:, None], across[down > 0][:, None]) > 1e-3
    assert stats.binomtest(int(crops[:, 4].sum()), n, 0.5).pvalue > 1e-3  # bilinear or bicubic
    with generators_kept():
        random.seed(0)
        blank = torch.empty(1).expand(1, 12, 10)
        theirs = np.array([draws.crop.get_params(blank, draws.crop.scale, draws.crop.ratio) for _ in range(n)])
        patches = [[(top, left, *values.shape[1:]) for top, left, values in chosen._patches()] for _ in range(n)]
    theirs_erased = np.array([(one + [(0, 0, 0, 0)] * 2)[:2] for one in patches])
    assert p_value(crops[:, 2:4], theirs[:, 2:4]) > 1e-3 and p_value(crops[:, :2], theirs[:, :2]) > 1e-3
    for number in range(2):  # a rectangle that did not fit keeps its place in ours
        some = [np.sort(erased.reshape(n, 2, 4)[..., 2:].prod(-1), axis=1)[:, [number]]
                for erased in (erasures, theirs_erased)]
        assert p_value(*some) > 1e-3
    assert p_value(erasures[:, 0, :2], theirs_erased[:, 0, :2]) > 1e-3


def test_hashed_numbers_are_uniform_and_independent():
    """Between numbers of a sample, images, epochs, repeats and seeds that lie next to each other."""
    n, zeros = 2**16, np.zeros(2**16, np.int64)
    index = np.arange(n)
    numbers = Uniforms(0, zeros, index, zeros).take(40)
    others = [numbers[:, 1], numbers[:, 20], np.roll(numbers[:, 0], 1), Uniforms(0, zeros + 1, index, zeros).take(),
              Uniforms(0, zeros, index, zeros + 1).take(), Uniforms(1, zeros, index, zeros).take(),
              Uniforms(0, index, zeros, zeros).take()]
    for column in numbers.T:
        assert stats.chisquare(np.histogram(column, 256, (0, 1))[0]).pvalue > 1e-4
    for other in others:
        pairs = np.histogram2d(numbers[:, 0], other, 16, ((0, 1), (0, 1)))[0]
        assert stats.chisquare(pairs.ravel()).pvalue > 1e-4
    assert 0 <= numbers.min() and numbers.max() < 1
    assert len(np.unique(numbers)) == numbers.size


def test_hashed_numbers_are_splitmix64s():
    """The first outputs of the public-domain C code, from state 1234567."""
    numbers = samples(1)
    numbers.states = np.array([1234567], np.uint64)
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [int(number * 2**53) for number in numbers.take(4)[0]] == [output >> 11 for output in outputs]


# A function of the sample alone

def prepared(steps: list[list[data.Batch]]) -> list[torch.Tensor]:
    """What the model sees, and its targets."""
    prepare = data.Prepare(*data.norm_values("half"), 5, mixup=0.8, cutmix=1.0, label_smoothing=0.1, seed=3)
    return [tensor for step, batches in enumerate(steps) for batch in batches
            for tensor in prepare(batch, step, "cpu", True)]


@pytest.mark.parametrize("mode", ["pixel", "rand"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_ranks_micro_batches_and_restarts_share_one_global_batch(mode, repeats):
    made = kept(grain(), transform(erasing_mode=mode))
    whole = prepared(run(made, repeats=repeats))
    for world, accumulation in ((2, 1), (4, 1), (1, 2), (1, 4), (2, 2)):
        ranks = [run(made, repeats=repeats, rank=rank, world=world, accumulation=accumulation) for rank in range(world)]
        assert all(len(batches) == accumulation for rank in ranks for batches in rank)
        parts = prepared([[micro for rank in ranks for micro in rank[step]] for step in range(7)])
        for at in range(2):
            assert torch.equal(torch.cat(parts[at::2]), torch.cat(whole[at::2]))
    cut = run(made, repeats=repeats, steps=3) + run(kept(grain(), transform(erasing_mode=mode)), repeats=repeats,
                                                    start_step=3)
    assert all(torch.equal(*pair) for pair in zip(prepared(cut), whole, strict=True))
    halves = prepared([batch.split(2) for batch, in run(made, repeats=repeats)])
    assert torch.equal(torch.cat(halves[::2]), torch.cat(whole[::2]))


def test_targets_and_order_are_the_loaders_and_images_differ_by_epoch_repeat_and_seed():
    made = kept(grain(), transform())
    plain = data.train_batches(grain(), transform(), seed=3, batch_size=8, steps=7)
    for (one,), (other,) in zip(run(made), plain, strict=True):
        assert torch.equal(one.indices, other.indices) and torch.equal(one.targets, other.targets)
    alone = kept(grain(1), transform())
    images = [bytes(image.contiguous().numpy()) for batch, in run(alone, repeats=2) for image in batch.images]
    assert len(set(images)) > 40  # of 56 draws of one image
    other = data.OnDevice(grain(1), transform(), seed=4, device=CPU, max_mb=1)
    assert not torch.equal(run(other)[0][0].images, run(alone)[0][0].images)


@pytest.mark.slow
def test_killed_and_continued(tmp_path):
    config = soak.compose("data.on_device=true", "augment.auto_augment=null", "schedule.steps=20")
    folders = tmp_path / "uncut", tmp_path / "cut"
    whole = soak.train(config, folders[0])
    assert whole.wait(120) == 0, whole.words()
    assert "the training images stay on the device" in whole.words()
    soak.run_cut(config, folders[1], random.Random(1), 1, tally := soak.Kills(), longest=0.5)
    assert tally.count == 1
    assert soak.differences(*folders) == 0


def test_a_run_from_before_the_setting_continues_with_it_off():
    config = soak.compose()
    before = {**config, "data": {name: value for name, value in config["data"].items() if name != "on_device"}}
    assert changed(before, config) == {}
    assert changed(before, soak.changed(config, data_on_device=True)) == {"data.on_device": (None, True)}
    assert read_settings(before).data.on_device is False  # as evaluation reads it


# Bad images and refusals

def test_bad_images_are_replaced_as_the_loader_does(tmp_path):
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (9, 9), (60 * (name == "b") + 10 * number,) * 3).save(
                    tmp_path / split / name / f"{number}.png")
    for broken in ("a/1.png", "b/2.png", "b/3.png"):
        (tmp_path / "train" / broken).write_bytes(b"")
    Image.new("CMYK", (9, 9), (0, 90, 0, 0)).save(tmp_path / "train/a/4.jpg")  # refused by the fast decoder
    images, plain = data.load("folder", root=str(tmp_path)).train, transform(4, random_erasing=0.0)
    made = run(kept(images, plain), batch_size=4)
    expected = list(data.train_batches(images, plain, seed=3, batch_size=4, steps=7))
    assert [batch.bad for batch, in made] == [batch.bad for batch, in expected]
    assert [batch.pil_fallbacks for batch, in made] == [batch.pil_fallbacks for batch, in expected]
    assert sum(batch.pil_fallbacks for batch, in made) > 2
    for (one,), (other,) in zip(made, expected, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.targets, other.targets)  # of one colour each
    with pytest.raises(UserError, match="data.max_bad=2"):
        run(kept(images, plain), batch_size=4, max_bad=2)


@pytest.mark.parametrize(("options", "word"), [
    ({"auto_augment": "rand-m9-mstd0.5-inc1"}, "augment.auto_augment"), ({"color_jitter": 0.4}, "color_jitter"),
    ({"grayscale_prob": 0.1}, "grayscale_prob"), ({"gaussian_blur_prob": 0.1}, "gaussian_blur_prob")])
def test_colours_are_refused(options, word):
    with pytest.raises(UserError, match=f"{word}.*data.on_device=false"):
        kept(grain(), transform(16, **options))


def test_many_and_unequal_images_are_refused():
    with pytest.raises(UserError, match="data.in_memory_mb=1.*data.on_device=false"):
        kept(grain(1000, 20, 20), transform(), max_mb=1)
    unequal = grain()
    unequal.image = lambda index: torch.zeros(3, 8 + index % 2, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match="9 x 8.*data.on_device=false"):
        kept(unequal, transform())
    assert run(kept(unequal, transform(crop_scale=None)))  # made equal on the way to the device


@pytest.mark.gpu
def test_a_gpu_makes_the_same_bits_and_the_host_never_waits():
    for size in (8, 32):
        here, there = (kept(grain(), transform(size), torch.device(device)) for device in ("cpu", "cuda"))
        stream = there.train_batches(batch_size=8, steps=5)
        next(stream)
        torch.cuda.set_sync_debug_mode("error")
        try:
            made = [batch for batch, in stream]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for one, (other,) in zip(made, run(here, steps=5)[1:], strict=True):
            assert torch.equal(one.images.cpu(), other.images) and one.images.is_cuda
            assert torch.equal(one.erasures.places.cpu(), other.erasures.places)
            assert torch.equal(one.erasures.values.cpu(), other.erasures.values)
