"""What the device does to a batch, against timm's Mixup arithmetic and plain sums."""

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data import mixup as timm_mixup

import deepvit.data as data
from deepvit.data.loader import Batch, Erasures
from deepvit.data.prepare import mixes

HALF = ((0.5,) * 3, (0.5,) * 3)


def batch_of(size: int, seed: int = 0, erasures: Erasures | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 12, 10), generator=generator, dtype=torch.uint8)
    nothing = Erasures(torch.empty(0, 5, dtype=torch.int64), torch.empty(0))
    return Batch(images, torch.arange(size) % 4, torch.arange(size), erasures or nothing)


def mirrored(size: int) -> list[int]:
    """An order of the rows in which timm's partner (the mirrored row) is our partner (the neighbour)."""
    return [*range(0, size, 2), *reversed(range(1, size, 2))]


def test_normalised_as_published():
    batch = batch_of(4)
    for norm in ("half", "imagenet"):
        mean, std = data.norm_values(norm)
        x, y = data.Prepare(mean, std, 4)(batch, 0, "cpu", False)
        expected = (batch.images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        assert torch.allclose(x, expected, atol=1e-6) and x.is_contiguous()
        assert torch.equal(y, batch.targets)


@pytest.mark.parametrize("mixup,cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_is_timms_for_the_same_lambda_and_partner(monkeypatch, mixup, cutmix):
    prepare = data.Prepare(*HALF, 4, mixup, cutmix, label_smoothing=0.1, seed=1)
    order, kinds = mirrored(8), set()
    for step in range(12):
        batch = batch_of(8, step)
        x, y = prepare(batch, step, "cpu", True)
        lam, box = prepare.mixing(step, (12, 10))
        kinds.add(box is None)
        theirs = timm_mixup.Mixup(1.0, 1.0, label_smoothing=0.1, num_classes=4)
        monkeypatch.setattr(theirs, "_params_per_batch", lambda lam=lam, box=box: (lam, box is not None))
        monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", lambda shape, lam, box=box, **_: (box, lam))
        plain = data.Prepare(*HALF, 4)(batch, step, "cpu", False)[0]
        expected_x, expected_y = theirs(plain[order], batch.targets[order])
        assert torch.allclose(x[order], expected_x, atol=1e-6)
        assert torch.allclose(y[order], expected_y, atol=1e-6)
        assert torch.allclose(y.sum(1), torch.ones(8))
    assert kinds == {box for box, on in ((True, mixup), (False, cutmix)) if on}


def test_cutmix_lambda_is_the_area_left():
    prepare = data.Prepare(*HALF, 4, cutmix=1.0)
    for step in range(200):
        lam, (top, bottom, left, right) = prepare.mixing(step, (12, 10))
        assert 0 <= top <= bottom <= 12 and 0 <= left <= right <= 10
        assert lam == 1 - (bottom - top) * (right - left) / 120


def test_lambdas_are_distributed_as_timms():
    """Shares of mixing and of cutmix over 3000 steps, four standard errors wide; lambdas against timm's own draws."""
    prepare = data.Prepare(*HALF, 4, mixup=0.8, cutmix=1.0, mix_prob=0.7, switch_prob=0.25)
    drawn = [prepare.mixing(step, (1000, 1000)) for step in range(3000)]
    mixed = np.array([lam for lam, box in drawn if box is None and lam != 1.0])
    cut = np.array([lam for lam, box in drawn if box is not None])
    assert abs((len(mixed) + len(cut)) / 3000 - 0.7) < 0.034
    assert abs(len(cut) / (len(mixed) + len(cut)) - 0.25) < 0.038
    timms = [timm_mixup.Mixup(*alphas, num_classes=4) for alphas in ((0.8, 0.0), (0.0, 1.0))]
    np.random.seed(0)
    with_timm = [one._params_per_batch()[0] for one in timms for _ in range(3000)]
    cut_by_timm = [timm_mixup.cutmix_bbox_and_lam((1000, 1000), lam)[1] for lam in with_timm[3000:]]
    assert stats.ks_2samp(mixed, with_timm[:3000]).pvalue > 1e-4
    assert stats.ks_2samp(cut, cut_by_timm).pvalue > 1e-4


@pytest.mark.parametrize("pieces", [2, 4])
def test_micro_batches_together_are_the_whole_batch(pieces):
    prepare = data.Prepare(*HALF, 4, 0.8, 1.0, label_smoothing=0.1)
    whole = batch_of(8)
    for step in range(6):
        x, y = prepare(whole, step, "cpu", True)
        parts = [prepare(Batch(*(value.chunk(pieces)[part] for value in (whole.images, whole.targets, whole.indices)),
                               whole.erasures), step, "cpu", True) for part in range(pieces)]
        assert torch.equal(torch.cat([part[0] for part in parts]), x)
        assert torch.equal(torch.cat([part[1] for part in parts]), y)


def test_erasing_comes_last_and_only_in_training():
    values = torch.randn(3 * 2 * 3 + 3 * 4 * 1)
    erasures = Erasures(torch.tensor([[1, 0, 4, 2, 3], [3, 8, 9, 4, 1]]), values)
    batch = batch_of(4, erasures=erasures)
    prepare = data.Prepare(*HALF, 4, mixup=0.8)
    mixed = prepare(batch_of(4), 0, "cpu", True)[0]
    mixed[1, :, 0:2, 4:7] = values[:18].view(3, 2, 3)
    mixed[3, :, 8:12, 9:10] = values[18:].view(3, 4, 1)
    assert torch.equal(prepare(batch, 0, "cpu", True)[0], mixed)
    assert torch.equal(prepare(batch, 0, "cpu", False)[0], prepare(batch_of(4), 0, "cpu", False)[0])


def test_smoothing_alone():
    _, y = data.Prepare(*HALF, 4, label_smoothing=0.2)(batch_of(3), 0, "cpu", True)
    assert torch.allclose(y, torch.eye(4)[:3] * 0.8 + 0.05)


def test_what_is_never_mixed_needs_no_pairs():
    assert not mixes(data.Prepare(*HALF, 4, mixup=0.8, mix_prob=0.0))


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    prepare = data.Prepare(*HALF, 4, 0.8, 1.0, label_smoothing=0.1)
    for step in range(4):
        here, there = (prepare(batch_of(8), step, device, True) for device in ("cpu", "cuda"))
        assert torch.allclose(here[0], there[0].cpu(), atol=1e-6) and torch.allclose(here[1], there[1].cpu())
