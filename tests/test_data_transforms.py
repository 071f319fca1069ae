"""Decoding and transforms against PIL and timm on the same images and the same draws."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms.functional import pil_to_tensor

from deepvit.data.decode import decode, resolve_decoder
from deepvit.data.stream import generators_kept, seed_sample
from deepvit.data.transforms import CentreCrop, eval_transform, train_transform
from deepvit.errors import UserError

HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some grain, as a photograph has."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return Image.fromarray(np.clip(np.asarray(coarse) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options) -> bytearray:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return bytearray(buffer.getvalue())


@pytest.fixture(scope="module")
def photos() -> list[bytearray]:
    sizes = [(500, 375), (375, 500), (333, 500), (640, 480), (120, 90), (224, 224)]
    return [jpeg(photo(*size, seed=seed)) for seed, size in enumerate(sizes)]


@pytest.mark.parametrize("size,crop_pct", [(224, 0.9), (384, 1.0), (32, 1.0)])
def test_evaluation_equals_timm(photos, size, crop_pct):
    theirs = create_transform(size, crop_pct=crop_pct, interpolation="bicubic", use_prefetcher=True)
    ours = eval_transform(size, crop_pct, "bicubic")
    for data in photos:
        assert torch.equal(ours(decode(data, "pil")[0])[0], theirs(decode(data, "pil")[0]))


def test_published_sizes():
    """248 by bicubic, then the middle 224: what the crop of a ramp shows is where it was taken."""
    ramp = Image.fromarray(np.repeat(np.arange(248, dtype=np.uint8)[None], 248, 0)).convert("RGB")
    assert eval_transform(224)(ramp)[0][0, 0, [0, -1]].tolist() == [12, 235]


@pytest.mark.parametrize("policy,interpolation",
                         [(None, "bicubic"), ("rand-m9-mstd0.5-inc1", "random"), ("3a", "bicubic")])
def test_training_equals_timm_for_the_same_draws(photos, policy, interpolation):
    theirs = create_transform(64, is_training=True, auto_augment=policy, interpolation=interpolation,
                              use_prefetcher=True, **HALF)
    ours = train_transform(64, auto_augment=policy, interpolation=interpolation)
    with generators_kept():
        for seed in range(24):
            image = decode(photos[seed % len(photos)], "pil")[0]
            seed_sample(0, 0, seed, 0)
            expected = theirs(image)
            seed_sample(0, 0, seed, 0)
            assert torch.equal(ours(image)[0], expected)


def test_fast_path_is_within_a_twentieth_of_pil(photos):
    crop = train_transform(224, color_jitter=None)
    for transform in (crop, eval_transform(224)):
        errors = []
        with generators_kept():
            for index, data in enumerate(photos):
                made = []
                for decoder in ("pil", "torchvision"):
                    seed_sample(0, 0, index, 0)
                    made.append(transform(decode(data, decoder)[0])[0].float())
                errors.append((made[0] - made[1]).abs().mean().item())
        assert 0 <= np.mean(errors) <= 0.05


def test_the_fast_path_is_the_default_here():
    assert resolve_decoder("auto") == "torchvision"
    with pytest.raises(UserError, match="Did you mean 'torchvision'"):
        resolve_decoder("torchvison")


def test_erasing_is_what_timm_would_have_written():
    ours = train_transform(48, random_erasing=0.9, erasing_mode="pixel", erasing_count=3, color_jitter=None)
    with generators_kept():
        written = 0
        for seed in range(20):
            seed_sample(1, 0, seed, 0)
            state = random.getstate(), torch.get_rng_state()
            patches = ours._patches()
            random.setstate(state[0])
            torch.set_rng_state(state[1])
            expected = RandomErasing(0.9, mode="pixel", max_count=3, device="cpu")(torch.zeros(3, 48, 48))
            drawn = torch.zeros(3, 48, 48)
            for top, left, values in patches:
                drawn[:, top:top + values.shape[1], left:left + values.shape[2]] = values
            assert torch.equal(drawn, expected)
            written += len(patches)
        assert written > 20


def test_every_policy_survives_the_installed_pillow():
    """Pillow 13 refuses posterize to 0 bits, which timm's increasing magnitudes reach."""
    transform = train_transform(32, auto_augment="rand-m10-mstd2-inc1")
    image = photo(40, 40)
    with generators_kept():
        for seed in range(300):
            seed_sample(0, 0, seed, 0)
            assert transform(image)[0].shape == (3, 32, 32)


@pytest.mark.parametrize("shape", [(1, 1), (20_000, 3), (3, 20_000), (5, 300)])
@pytest.mark.parametrize("tensor", [False, True])
def test_extreme_shapes(shape, tensor):
    image = Image.new("RGB", shape, (10, 20, 30))
    image = pil_to_tensor(image) if tensor else image
    for transform in (eval_transform(224), train_transform(224, color_jitter=None)):
        with generators_kept():
            for seed in range(8):
                seed_sample(0, 0, seed, 0)
                pixels = transform(image)[0]
                assert pixels.shape == (3, 224, 224)
                assert pixels.float().mean((1, 2)).round().tolist() == [10, 20, 30]


def test_pairs_of_sizes():
    crop = CentreCrop((32, 64), 1.0, "bicubic")
    assert crop(photo(100, 100)).size == (64, 32)
    assert tuple(crop(pil_to_tensor(photo(300, 90))).shape) == (3, 32, 64)


@pytest.mark.parametrize("wrong,word", [
    ({"auto_augment": "nonsense"}, "auto_augment"), ({"auto_augment": "rand-q9"}, "auto_augment"),
    ({"interpolation": "bicubik"}, "bicubic"), ({"erasing_mode": "noise", "random_erasing": 0.1}, "erasing_mode"),
    ({"crop_scale": (0.9, 0.1)}, "crop_scale"),
])
def test_wrong_settings_are_named(wrong, word):
    with pytest.raises(UserError, match=word):
        train_transform(32, **wrong)
