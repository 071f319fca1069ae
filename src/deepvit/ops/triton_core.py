"""Launches the Triton kernels: which shapes they serve, with which tiles, and what the compiler makes of them."""

import os
from math import log2
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from deepvit.ops import triton_backward, triton_kernels
from deepvit.ops.plain import tokens_first

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as until 3.9, which warns that this will change


class Tiling(NamedTuple):
    rows: int  # BM
    cols: int  # BN
    warps: int = 8


def head_widths(d: int) -> tuple[int, int]:
    """d padded to D0 + D1: 16, 32, 32 + 16 or 64."""
    return (16, 0) if d <= 16 else (32, 0) if d <= 32 else (32, 16) if d <= 48 else (64, 0)


def tiling(d: int, dtype: torch.dtype, backward: bool) -> Tiling:
    """Tiles that compile for sm_90 with the fewest spills (`triton_report`); float32 holds twice the bytes."""
    wide = backward or dtype == torch.float32 or d > 32
    return Tiling(16, 16) if wide else Tiling(32, 16)


def refusal(device: torch.device, dtype: torch.dtype, heads: int, d: int) -> str:
    """Why the kernels do not serve such q, k, v; empty if they do."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"no Triton kernel for {dtype}"
    if heads > 16 or d > 64 or (d > 48 and dtype == torch.float32):
        return f"no Triton kernel for {heads} heads of width {d} in {dtype}"  # shared memory: 227 KiB
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (9, 0):
        return "the Triton kernels are sized for the shared memory of sm_90"
    return "" if torch.version.hip is None else "the Triton kernels have not been tried on AMD"


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _options(d: int, dtype: torch.dtype, backward: bool) -> dict:
    tile, (d0, d1) = tiling(d, dtype, backward), head_widths(d)
    return {"BM": tile.rows, "BN": tile.cols, "D0": d0, "D1": d1, "WIDEN": INTERPRETED, "PRECISION": _precision(),
            "num_warps": tile.warps, "num_stages": 1}


def _same_strides(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Views of one packed tensor pass as they are; anything else is copied."""
    if len({x.stride() for x in inputs}) == 1 and inputs[0].stride(-1) == 1:
        return inputs
    return tuple(x.contiguous() for x in inputs)


def _centred(v: Tensor) -> Tensor:
    """v less its mean over the tokens, with v's strides. Rows of M sum to 0 and softmax's backward forgets what is
    constant in a row, so results are the same; but where tokens are alike bf16 would round M v to noise."""
    lifted = v.new_empty_strided(v.shape, v.stride())
    return torch.sub(v, v.mean(dim=2, keepdim=True, dtype=torch.float32), out=lifted)


def centred_mix(q: Tensor, k: Tensor, v: Tensor, mix: Tensor, scale: float,
                statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`plain.centred_mix` for q, k, v of float32 or bfloat16, and the rows' log2-sum-exp2 `[B, H, N]`."""
    q, k, v = _same_strides(q, k, v)
    total, v = v.sum(dim=2, dtype=mix.dtype), _centred(v)
    B, H, N, d = q.shape
    options = _options(d, q.dtype, backward=False)
    grid = (triton.cdiv(N, options["BM"]), B)
    u, lse = tokens_first(q), mix.new_empty(B, H, N)
    sumsq = mix.new_empty(B * grid[0], 16)
    triton_kernels.forward[grid](q, k, v, mix.contiguous(), u, lse, sumsq, *q.stride()[:3], H, N, d,
                                 scale * log2(2.718281828459045), **options)
    return u, sumsq.view(B, -1, 16)[:, :, :H].sum(dim=1), total, lse


def centred_mix_backward(du: Tensor, dsumsq: Tensor, dtotal: Tensor, q: Tensor, k: Tensor, v: Tensor, mix: Tensor,
                         lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and mix; the arguments as in `tiles.centred_mix_backward`."""
    q, k, v = _same_strides(q, k, v)
    v = _centred(v)
    B, H, N, d = q.shape
    options = _options(d, q.dtype, backward=True)
    du = du.transpose(1, 2).contiguous()  # [B, N, H, d]
    dq, dk, dv = (tokens_first(x) for x in (q, k, v))
    mix, twice, delta = mix.contiguous(), (2 * dsumsq).contiguous(), torch.empty_like(lse)
    given = (q, k, v, du, mix, lse, twice)
    sizes = (*q.stride()[:3], H, N, d, scale, scale * log2(2.718281828459045))
    grid = (triton.cdiv(N, options["BM"]), B)
    dmix = mix.new_empty(B * grid[0], 16, 16)
    triton_backward.by_queries[grid](*given, dq, delta, dmix, *sizes, **options)
    grid = (triton.cdiv(N, options["BN"]), B)
    triton_backward.by_keys[grid](*given, delta, dtotal.contiguous(), dk, dv, *sizes, **options)
    return dq, dk, dv, dmix[:, :H, :H].sum(dim=0)
