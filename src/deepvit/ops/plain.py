"""The core of the affine form in traceable PyTorch, for exports and function transforms alone: it keeps the maps."""

import torch
from torch import Tensor

from deepvit.ops.reference import softmax_maps


def centred_mix(q: Tensor, k: Tensor, v: Tensor, mix: Tensor, scale: float,
                statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What every core computes. With `C = softmax(scale q k^T) - 1/N` and `M_h = sum_g mix[h, g] C_g`:

    Args:
        q, k, v: `[B, H, N, d]`, any strides; mix: `[H, H]`, float32 (float64 if q is); statistics: whether to sum.
    Returns:
        U `[B, H, N, d]` = M v in v's dtype; sumsq `[B, H]` = sum of M^2 over both N (zeros without `statistics`); total
        `[B, H, d]` = sum of v over N. The last two in mix's dtype.
    """
    maps = softmax_maps(q.to(mix.dtype), k.to(mix.dtype), scale) - 1 / k.shape[2]  # [B, H, N, N], rows sum to 0
    mixed = torch.einsum("hg,bgij->bhij", mix, maps)  # [B, H, N, N], rows sum to 0
    sumsq = mixed.square().sum(dim=(2, 3)) if statistics else mix.new_zeros(mixed.shape[:2])
    return (mixed @ v.to(mix.dtype)).to(v.dtype), sumsq, v.sum(dim=2, dtype=mix.dtype)


def tokens_first(x: Tensor) -> Tensor:
    """An empty `[B, H, N, d]` laid out `[B, N, H, d]`, so that the reshape to `[B, N, D]` after attention is a view."""
    B, H, N, d = x.shape
    return x.new_empty_strided((B, H, N, d), (N * H * d, d, H * d, 1))
