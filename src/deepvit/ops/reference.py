"""What re-attention is, in plain PyTorch. Every faster path must equal this in output and in every gradient.

Zhou et al., "DeepViT: Towards Deeper Vision Transformer" (arXiv:2103.11886), eq. 3, with the arithmetic of the
published code: softmax, dropout, a 1x1 convolution over heads *with bias*, BatchNorm over heads, a constant factor.
Rows of the resulting maps do not sum to one and entries may be negative.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class HeadNorm(NamedTuple):
    """BatchNorm over the head axis of `[B, H, N, N]` maps, as the arguments of `F.batch_norm`.

    `running_mean` and `running_var` are updated in place in training, and may both be None there (no update).
    """

    gamma: Tensor  # [H]
    beta: Tensor  # [H]
    running_mean: Tensor | None  # [H]
    running_var: Tensor | None  # [H]
    eps: float = 1e-5
    momentum: float = 0.1


def softmax_maps(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """`softmax(scale * q k^T)` over keys. q, k: `[B, H, N, d]` -> `[B, H, N, N]`, rows sum to 1; scale: d^-0.5."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q * scale @ k.mT).softmax(dim=-1)


def mix_heads(maps: Tensor, mix: Tensor, bias: Tensor | None = None) -> Tensor:
    """`out[o] = sum_h mix[o, h] maps[h] + bias[o]`. maps `[B, H, N, N]`, mix `[H, H]`, bias `[H]`."""
    return F.conv2d(maps, mix[:, :, None, None], bias)


def exchange_heads(maps: Tensor, mix: Tensor | None = None, bias: Tensor | None = None, *,
                   norm: HeadNorm | None = None, map_scale: float = 1.0, training: bool = False) -> Tensor:
    """Softmax maps `[B, H, N, N]` -> final maps: mixed over heads, normalised, scaled; each part only if given."""
    if mix is not None:
        maps = mix_heads(maps, mix, bias)
    if norm is not None:
        maps = F.batch_norm(maps, norm.running_mean, norm.running_var, norm.gamma, norm.beta,
                            training, norm.momentum, norm.eps)
    return maps if map_scale == 1.0 else maps * map_scale


def reattention(q: Tensor, k: Tensor, v: Tensor, mix: Tensor | None = None, bias: Tensor | None = None, *,
                norm: HeadNorm | None = None, scale: float | None = None, map_scale: float = 1.0,
                dropout_p: float = 0.0, training: bool = False) -> Tensor:
    """Re-attention by its definition; materialises the `[B, H, N, N]` maps.

    Args:
        q, k, v: `[B, H, N, d]`.
        mix, bias: Theta `[H, H]` (row = new head, column = source head) and its bias `[H]`; None: no mixing.
        norm: BatchNorm over heads, or None.
        scale: factor on `q k^T`; default d^-0.5.
        map_scale: factor on the maps after the norm (the published `transform_scale`).
        dropout_p: dropout on the softmax maps, in training only.
        training: batch statistics and dropout; else running statistics.
    Returns:
        `[B, H, N, d]`.
    """
    maps = F.dropout(softmax_maps(q, k, scale), dropout_p, training)
    return exchange_heads(maps, mix, bias, norm=norm, map_scale=map_scale, training=training) @ v
