"""Launches the Triton kernels: which tensors they serve on which card, and with which tiles."""

import os
from math import inf, log2
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from deepvit.ops import triton_kernels
from deepvit.ops.tiles import tokens_first

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2_E = log2(2.718281828459045)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as until 3.9, which warns that this will change


class Tiling(NamedTuple):
    rows: int  # BM
    cols: int  # BN
    stages: int  # 2: the next tile is loaded while one is computed, wherever that spills no more
    shared: int  # KiB that it takes on any card, in either half precision, in float32 with TF32 or without
    warps: int = 8


TILES = {  # padded head width and bytes of an element; checked by compiling, see tests/test_ops_triton.py
    (16, 2): {"forward": Tiling(32, 16, 2, 49), "bwd_dq": Tiling(16, 16, 2, 49), "bwd_dkv": Tiling(16, 16, 2, 43)},
    (32, 2): {"forward": Tiling(32, 16, 2, 81), "bwd_dq": Tiling(16, 16, 2, 81), "bwd_dkv": Tiling(16, 16, 2, 75)},
    (48, 2): {"forward": Tiling(32, 16, 2, 113), "bwd_dq": Tiling(16, 16, 1, 89), "bwd_dkv": Tiling(16, 16, 1, 105)},
    (64, 2): {"forward": Tiling(16, 16, 2, 105), "bwd_dq": Tiling(16, 16, 1, 113), "bwd_dkv": Tiling(16, 16, 1, 137)},
    (16, 4): {"forward": Tiling(16, 16, 2, 67), "bwd_dq": Tiling(16, 16, 1, 98), "bwd_dkv": Tiling(16, 16, 1, 99)},
    (32, 4): {"forward": Tiling(16, 16, 1, 81), "bwd_dq": Tiling(16, 16, 1, 162), "bwd_dkv": Tiling(16, 16, 1, 195)},
}


class Launch(NamedTuple):
    """A kernel and everything it is launched with."""

    kernel: triton.runtime.JITFunction
    grid: tuple[int, int]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.options)


def head_widths(d: int) -> tuple[int, int]:
    """d padded to D0 + D1: 16, 32, 32 + 16 or 64."""
    return (16, 0) if d <= 16 else (32, 0) if d <= 32 else (32, 16) if d <= 48 else (64, 0)


def shared_memory(d: int, dtype: torch.dtype) -> float:
    """KiB of shared memory that a block must be allowed to have; infinite where there are no tiles."""
    tiles = TILES.get((sum(head_widths(d)), dtype.itemsize)) if d <= 64 and dtype in DTYPES else None
    return max(tile.shared for tile in tiles.values()) if tiles else inf


def refusal(device: torch.device, dtype: torch.dtype, heads: int, d: int) -> str:
    """Why the kernels do not serve such q, k, v; empty if they do."""
    if torch.version.hip is not None:
        return "the Triton kernels have not been tried on AMD"
    needed = shared_memory(d, dtype)
    if heads > 16 or needed == inf:
        return f"no Triton kernel for {heads} heads of width {d} in {dtype}"
    card = torch.cuda.get_device_properties(device)
    if card.major < 8 or card.shared_memory_per_block_optin < needed * 1024:
        return f"no Triton kernel for heads of width {d} in {dtype} on {card.name} ({needed} KiB of shared memory)"
    return ""


def _options(kernel: str, q: Tensor) -> dict[str, Any]:
    d0, d1 = head_widths(q.shape[3])
    tile = TILES[d0 + d1, q.dtype.itemsize][kernel]
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return {"BM": tile.rows, "BN": tile.cols, "D0": d0, "D1": d1, "WIDEN": INTERPRETED, "PRECISION": precision,
            "num_warps": tile.warps, "num_stages": tile.stages}


def _prepared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v less its mean over the tokens, of one stride and a width that the kernels load without a mask."""
    # Rows of M sum to 0 and softmax's backward forgets what is constant in a row, so the mean changes no result; but
    # where tokens are alike half precision would round M v to noise
    B, H, N, d = q.shape
    width, mean = sum(head_widths(d)), v.mean(dim=2, keepdim=True, dtype=torch.float32)
    if width == d and q.stride() == k.stride() == v.stride() and q.stride(3) == 1:
        return q, k, torch.sub(v, mean, out=v.new_empty_strided(v.shape, v.stride()))
    packed = q.new_zeros(3, B, N, H, width).transpose(2, 3)  # [3, B, H, N, D]
    packed[0, ..., :d], packed[1, ..., :d], packed[2, ..., :d] = q, k, v - mean
    return tuple(packed.unbind(0))


def forward_launch(q: Tensor, k: Tensor, v: Tensor, mix: Tensor, scale: float) -> tuple[Launch, tuple[Tensor, ...]]:
    """The launch that fills U, lse `[B, H, N]` and each tile's sum of squares."""
    B, H, N, d = q.shape
    options, u = _options("forward", q), tokens_first(q)
    q, k, v = _prepared(q, k, v)
    grid = (triton.cdiv(N, options["BM"]), B)
    lse, sumsq = mix.new_empty(B, H, N), mix.new_empty(B, grid[0], 16)
    arguments = (q, k, v, mix.contiguous(), u, lse, sumsq, *q.stride()[:3], H, N, d, scale * LOG2_E)
    return Launch(triton_kernels.forward, grid, arguments, options), (u, lse, sumsq)


def centred_mix(q: Tensor, k: Tensor, v: Tensor, mix: Tensor, scale: float, statistics: bool) -> tuple[Tensor, ...]:
    """`reference.centred_mix` for q, k, v of float32 or half precision, and the rows' log2-sum-exp2 `[B, H, N]`."""
    launch, (u, lse, sumsq) = forward_launch(q, k, v, mix, scale)
    launch.run()
    return u, sumsq[:, :, :q.shape[1]].sum(dim=1), v.sum(dim=2, dtype=mix.dtype), lse


def backward_launches(du: Tensor, dsumsq: Tensor, dtotal: Tensor, q: Tensor, k: Tensor, v: Tensor, mix: Tensor,
                      lse: Tensor, scale: float) -> tuple[tuple[Launch, Launch], tuple[Tensor, ...]]:
    """The launches, in this order, that fill dq, dk, dv and each tile's dmix."""
    B, H, N, d = q.shape
    options, key_options = (_options(kernel, q) for kernel in ("bwd_dq", "bwd_dkv"))
    dq, dk, dv = (tokens_first(x) for x in (q, k, v))
    q, k, v = _prepared(q, k, v)
    du, dtotal = (F.pad(x, (0, q.shape[3] - d)) for x in (du.transpose(1, 2), dtotal))  # [B, N, H, D], [B, H, D]
    given = (q, k, v, du.contiguous(), mix.contiguous(), lse, (2 * dsumsq).contiguous())
    sizes = (*q.stride()[:3], H, N, d, scale, scale * LOG2_E)
    grid, key_grid = (triton.cdiv(N, options["BM"]), B), (triton.cdiv(N, key_options["BN"]), B)
    delta, dmix = torch.empty_like(lse), mix.new_empty(B * grid[0], 16, 16)
    return (Launch(triton_kernels.bwd_dq, grid, (*given, dq, delta, dmix, *sizes), options),
            Launch(triton_kernels.bwd_dkv, key_grid, (*given, delta, dtotal.contiguous(), dk, dv, *sizes), key_options)
            ), (dq, dk, dv, dmix)


def centred_mix_backward(du: Tensor, dsumsq: Tensor, dtotal: Tensor, q: Tensor, k: Tensor, v: Tensor, mix: Tensor,
                         lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and mix; the arguments as in `tiles.centred_mix_backward`."""
    launches, (dq, dk, dv, dmix) = backward_launches(du, dsumsq, dtotal, q, k, v, mix, lse, scale)
    for launch in launches:
        launch.run()
    H = q.shape[1]
    return dq, dk, dv, dmix[:, :H, :H].sum(dim=0)
