"""Attention rollout: how much of each input token a block's tokens hold, if attention were all that moves them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def rollout(maps: Sequence[Tensor], every_block: bool = False) -> Tensor:
    """Abnar & Zuidema, arXiv:2005.00928: `R_n = A'_n R_{n-1}`, `A'` the mean over heads plus identity, rows sum to 1.

    Final maps of re-attention may be negative and need not sum to one; their absolute values are taken and each head's
    rows normalised first, which changes nothing for softmax maps.

    Args:
        maps: `[B, H, N, N]` per block, read once and in order.
        every_block: give `R_1 ... R_L` and not only the last.
    Returns:
        `[B, N, N]`, or `[L, B, N, N]`; rows sum to one.
    """
    result, all_results = None, []
    for block in maps:
        heads = F.normalize(block.float(), p=1, dim=-1, eps=1e-30).abs()
        step = (heads.mean(1) + torch.eye(block.shape[-1], device=block.device)) / 2  # [B, N, N], rows sum to 1
        step = step / step.sum(-1, keepdim=True)  # a row of zeros has only itself
        result = step if result is None else step @ result
        all_results += [result] if every_block else []
    return torch.stack(all_results) if every_block else result


def class_token_mask(rolled: Tensor, grid: tuple[int, int]) -> Tensor:
    """What the class token holds of each patch, from 0 to 1 (the largest): `[B, N, N]` -> `[B, rows, columns]`."""
    patches = grid[0] * grid[1]
    mask = rolled[:, 0, -patches:]
    return (mask / mask.amax(-1, keepdim=True)).unflatten(-1, grid)
