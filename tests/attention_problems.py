"""Random problems for the attention operations, and what comes of them."""

import torch
import torch.nn.functional as F

from deepvit import ops
from deepvit.ops import HeadNorm

EPS = {torch.float64: 1e-10, torch.float32: 2e-5}


def problem(B, H, N, d, dtype=torch.float64, *, seed=0, mixing=True, norm=True, packed=True, std=1.0):
    """Random arguments of an attention, as leaves: a packed `[B, N, 3, H, d]` or three strided tensors."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    qkv = (draw(B, N, 3, H, d) * std).to(dtype).requires_grad_()
    leaves = {"qkv": qkv}
    views = qkv.permute(2, 0, 3, 1, 4).unbind(0) if packed else [x.transpose(1, 2)[..., :d] for x in F.pad(
        qkv, (0, 3)).unbind(2)]
    if mixing:
        leaves |= {"mix": (torch.eye(H, dtype=torch.float64) + 0.3 * draw(H, H)).to(dtype).requires_grad_(),
                   "bias": draw(H).to(dtype).requires_grad_()}
    stats = {}
    if norm:
        leaves |= {"gamma": draw(H).to(dtype).requires_grad_(), "beta": draw(H).to(dtype).requires_grad_()}
        stats = {"running_mean": 0.1 * draw(H).to(dtype), "running_var": draw(H).abs().to(dtype) + 0.5}
    return views, leaves, stats


def outcome(op, arguments, **keywords):
    """Output, gradient of every leaf, and statistics after one call."""
    (q, k, v), leaves, stats = arguments
    norm = HeadNorm(leaves["gamma"], leaves["beta"], **stats) if stats else None
    out = op(q, k, v, leaves.get("mix"), leaves.get("bias"), norm=norm, **keywords)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(seed.to(out.dtype))
    return {"out": out.detach(), **{n: leaf.grad for n, leaf in leaves.items()}, **stats}


def assert_same(fast, slow, rtol):
    for name, want in slow.items():
        if want is None:
            assert fast[name] is None or not fast[name].any(), name
            continue
        error = (fast[name].double() - want.double()).norm()
        assert error <= rtol * (want.double().norm() + 0.1), f"{name}: {error / want.double().norm():.1e}"


class Attention(torch.nn.Module):
    def __init__(self, norm_batch=None):
        super().__init__()
        self.norm_batch = norm_batch
        self.mix, self.bn = torch.nn.Parameter(torch.randn(3, 3)), torch.nn.BatchNorm2d(3)

    def forward(self, qkv):
        norm = HeadNorm(self.bn.weight, self.bn.bias, self.bn.running_mean, self.bn.running_var)
        return ops.reattention(*qkv.unbind(0), self.mix, norm=norm, training=self.training, norm_batch=self.norm_batch)
