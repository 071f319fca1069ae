"""The head norm over two ranks equals one process on the whole batch, uneven shares included."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from deepvit import ops
from deepvit.ops import HeadNorm

SHARES = [slice(0, 3), slice(3, 4)]


def problem():
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    H = 3
    return {"qkv": draw(3, 4, H, 9, 4), "mix": draw(H, H), "gamma": draw(H), "beta": draw(H)}, draw(4, H, 9, 4)


def step(share, group):
    """Output, gradients and running statistics on this share of the batch."""
    inputs, seed = problem()
    inputs["qkv"] = inputs["qkv"][:, share].clone()
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    stats = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    norm = HeadNorm(leaves["gamma"], leaves["beta"], *stats)
    out = ops.reattention(*leaves["qkv"].unbind(0), leaves["mix"], norm=norm, training=True, group=group)
    out.backward(seed[share])
    return {"out": out.detach(), **{name: x.grad for name, x in leaves.items()}, "mean": stats[0], "var": stats[1]}


def run(rank, folder):
    torch.set_num_threads(1)
    calls, plain_all_reduce = [], dist.all_reduce

    def counted(tensor, **keywords):
        calls.append(tensor.numel())
        return plain_all_reduce(tensor, **keywords)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    dist.all_reduce = counted
    result = step(SHARES[rank], dist.group.WORLD)
    torch.save({**result, "calls": calls}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_group_of_one_changes_nothing(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        grouped = step(slice(0, 4), dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    for name, want in step(slice(0, 4), None).items():
        assert torch.allclose(grouped[name], want), name


@pytest.mark.slow
def test_two_ranks_are_one_batch(tmp_path):
    mp.spawn(run, args=(str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    whole = step(slice(0, 4), None)
    assert [p.pop("calls") for p in parts] == [[4, 4], [4, 4]]  # H sums and the count, forward and backward
    assert torch.allclose(torch.cat([p["out"] for p in parts]), whole["out"])
    assert torch.allclose(torch.cat([p["qkv"] for p in parts], dim=1), whole["qkv"])
    for name in ("mix", "gamma", "beta"):
        assert torch.allclose(parts[0][name] + parts[1][name], whole[name]), name
    for name in ("mean", "var"):
        assert all(torch.allclose(p[name], whole[name]) for p in parts), name
