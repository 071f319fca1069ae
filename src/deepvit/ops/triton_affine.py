"""The affine after the core as Triton kernels: `out = gain u + constant` in one pass, its backward in another.

Memory is `[B, N, C]` with the heads side by side, C = H d; `gain` is `[C]`, `constant` `[B, C]`. Float32 inside. Sums
over tokens stay in one program each, so results do not depend on any order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepvit.ops.plain import tokens_first

TILES = {"BN": 32, "BC": 128, "num_warps": 4}


@triton.jit
def affine(u, gain, constant, out, N, C, BN: tl.constexpr, BC: tl.constexpr):
    """BN tokens and BC channels of one sample."""
    b = tl.program_id(2).to(tl.int64)
    rows, cols = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BC + tl.arange(0, BC)
    there = (rows < N)[:, None] & (cols < C)[None, :]
    at = b * N * C + rows[:, None] * C + cols[None, :]
    scale = tl.load(gain + cols, mask=cols < C, other=0.0)
    shift = tl.load(constant + b * C + cols, mask=cols < C, other=0.0)
    x = tl.load(u + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, (x * scale[None, :] + shift[None, :]).to(out.dtype.element_ty), mask=there)


@triton.jit
def affine_backward(grad, u, gain, du, rows_of_grad, rows_of_product, N, C, BN: tl.constexpr, BC: tl.constexpr):
    """du, and the sums over all tokens of the gradient and of its product with u, for BC channels of one sample."""
    b = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    scale = tl.load(gain + cols, mask=cols < C, other=0.0)
    total, product = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    for start in range(0, N, BN):
        rows = start + tl.arange(0, BN)
        there = (rows < N)[:, None] & (cols < C)[None, :]
        at = b * N * C + rows[:, None] * C + cols[None, :]
        g = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
        x = tl.load(u + at, mask=there, other=0.0).to(tl.float32)
        total += tl.sum(g, 0)
        product += tl.sum(g * x, 0)
        tl.store(du + at, (g * scale[None, :]).to(du.dtype.element_ty), mask=there)
    tl.store(rows_of_grad + b * C + cols, total, mask=cols < C)
    tl.store(rows_of_product + b * C + cols, product, mask=cols < C)


def affine_out(u: Tensor, gain: Tensor, total: Tensor, shift: Tensor) -> Tensor:
    """`affine.affine_out`, laid out tokens first."""
    B, H, N, d = u.shape
    out = tokens_first(u)
    constant = (total * shift[:, None]).float().reshape(B, H * d)
    grid = (triton.cdiv(N, TILES["BN"]), triton.cdiv(H * d, TILES["BC"]), B)
    affine[grid](_flat(u), _per_channel(gain, d), constant, out, N, H * d, **TILES)
    return out


def affine_out_backward(grad: Tensor, u: Tensor, gain: Tensor, total: Tensor,
                        shift: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, gain, total and shift."""
    B, H, N, d = u.shape
    du = tokens_first(u)
    sums = torch.empty(2, B, H * d, device=u.device)
    grid = (triton.cdiv(H * d, TILES["BC"]), B)
    affine_backward[grid](_flat(grad), _flat(u), _per_channel(gain, d), du, *sums, N, H * d, **TILES)
    rows, products = sums.view(2, B, H, d)
    return (du, products.sum(dim=(0, 2)).to(gain.dtype), (rows * shift[:, None]).to(total.dtype),
            (rows * total).sum(dim=(0, 2)).to(shift.dtype))


def _flat(x: Tensor) -> Tensor:
    """`[B, H, N, d]` in memory as `[B, N, H, d]`; the core and the projection lay it out so."""
    return x.transpose(1, 2).contiguous()


def _per_channel(gain: Tensor, d: int) -> Tensor:
    return gain.float()[:, None].expand(-1, d).contiguous()
