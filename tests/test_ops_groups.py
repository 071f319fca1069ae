"""Batch statistics over groups of images: every path against the reference, the reference against BatchNorm."""

import pytest
import torch
from attention_problems import EPS, Attention, assert_same, outcome, problem

from deepvit import ops
from deepvit.ops import HeadNorm, core, reference, tiles

GROUPS = [None, 1, 2, 3, 5, 8]  # of 5 images: each alone, remainders, one group, one that is not full


@pytest.mark.parametrize("norm_batch", GROUPS)
@pytest.mark.parametrize("path", ["native", "tiles", "plain", "compiled", "dropout"])
def test_groups_of_images_equal_definition(path, norm_batch, monkeypatch):
    dtype = torch.float32 if path == "native" else torch.float64
    if path == "tiles":
        monkeypatch.setattr(tiles, "CPU_TILE", 4 * 7 * 3 * 16)
    if path == "plain":
        monkeypatch.setattr(core, "choose", lambda *_, **__: ("plain", ""))
    op = torch.compile(ops.reattention, fullgraph=True, backend="aot_eager") if path == "compiled" else ops.reattention
    options = {"training": True, "norm_batch": norm_batch, "dropout_p": 0.2 if path == "dropout" else 0.0}
    results = []
    for function, precision in ((op, dtype), (reference.reattention, torch.float64)):
        torch.manual_seed(3)
        results.append(outcome(function, problem(5, 3, 7, 4, precision), **options))
    results[1]["bias"] = None if path != "dropout" else results[1]["bias"]
    assert_same(*results, EPS[dtype])


@pytest.mark.parametrize("norm_batch", GROUPS)
def test_groups_are_batch_norms_of_their_own(norm_batch):
    """Each group as a module of its own sees it, and the running statistics at the mean of where these end."""
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shared = torch.nn.BatchNorm2d(3, dtype=torch.float64)
    norm = HeadNorm(shared.weight, shared.bias, shared.running_mean, shared.running_var)
    got, parts, weights, modules = ops.batch_norm(x, norm, True, norm_batch), [], [], []
    for group in x.split(norm_batch or 5):
        modules.append(torch.nn.BatchNorm2d(3, dtype=torch.float64))
        parts.append(modules[-1](group))
        weights.append(len(group) / 5)
    assert torch.equal(got, torch.cat(parts))
    for name in ("running_mean", "running_var"):
        want = sum(w * getattr(module, name) for w, module in zip(weights, modules, strict=True))
        assert torch.allclose(getattr(shared, name), want, rtol=1e-12)


def test_averages_over_parts_of_the_batch_are_exact():
    """Of micro-batches or ranks that begin with the same statistics: the mean of where they end is where all end."""
    (q, k, v), leaves, stats = problem(8, 3, 7, 4)

    def end(part):
        own = {name: value.clone() for name, value in stats.items()}
        norm = HeadNorm(leaves["gamma"], leaves["beta"], **own)
        out = ops.reattention(q[part], k[part], v[part], leaves["mix"], norm=norm, training=True, norm_batch=2)
        return out, own["running_mean"], own["running_var"]
    whole, parts = end(slice(None)), [end(slice(start, start + 4)) for start in (0, 4)]
    assert torch.allclose(torch.cat([part[0] for part in parts]), whole[0], rtol=1e-12)
    for i in (1, 2):
        assert torch.allclose((parts[0][i] + parts[1][i]) / 2, whole[i], rtol=1e-12)


@pytest.mark.parametrize("norm_batch", [None, 2, 32])
def test_export_in_training_takes_any_batch(norm_batch):
    program = torch.export.export(Attention(norm_batch), (torch.randn(3, 4, 3, 9, 4),),
                                  dynamic_shapes=({1: torch.export.Dim("batch", min=2)},)).module()
    model = Attention(norm_batch)
    model.mix.data.copy_(program.mix)
    for batch in (2, 3, 5, 33):
        qkv, results = torch.randn(3, batch, 3, 9, 4), []
        for module in (model, program):
            module.bn.running_mean.zero_(), module.bn.running_var.fill_(1.0)
            results.append((module(qkv), module.bn.running_var.clone()))
        for want, got in zip(*results):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
