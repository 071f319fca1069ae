"""What re-attention is, in plain PyTorch. Every faster path must equal this in output and in every gradient.

Zhou et al., "DeepViT: Towards Deeper Vision Transformer" (arXiv:2103.11886), eq. 3, with the arithmetic of the
published code: softmax, dropout, a 1x1 convolution over heads *with bias*, BatchNorm over heads, a constant factor.
Rows of the resulting maps do not sum to one and entries may be negative."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadNorm(NamedTuple):
    """BatchNorm over the head axis of `[B, H, N, N]` maps, as the arguments of `F.batch_norm`. The running statistics
    are updated in place in training, and may both be None there (no update)."""

    gamma: Tensor  # [H]
    beta: Tensor  # [H]
    running_mean: Tensor | None  # [H]
    running_var: Tensor | None  # [H]
    eps: float = 1e-5
    momentum: float = 0.1

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> "HeadNorm":
        """Of a module; momentum None (set by torch's `update_bn`) averages all batches counted so far."""
        momentum = 1 / max(1, int(norm.num_batches_tracked)) if norm.momentum is None else norm.momentum
        return cls(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, momentum)


def softmax_maps(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """`softmax(scale * q k^T)` over keys. q, k: `[B, H, N, d]` -> `[B, H, N, N]`, rows sum to 1; scale: d^-0.5."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q * scale @ k.mT).softmax(dim=-1)


def is_plain(gain: Tensor | float, centre: float) -> bool:
    """Whether `contrast` leaves the maps as they are."""
    return not isinstance(gain, Tensor) and gain == 1.0 and centre == 0.0


def contrast(maps: Tensor, gain: Tensor | float = 1.0, centre: float = 0.0) -> Tensor:
    """`(1 - centre) / N + gain (A - 1/N)` of softmax maps A `[B, H, N, N]`; gain: one number, or `[H]`."""
    if is_plain(gain, centre):
        return maps
    uniform = 1 / maps.shape[-1]
    gain = gain[:, None, None] if isinstance(gain, Tensor) else gain
    return (1 - centre) * uniform + gain * (maps - uniform)


def mix_heads(maps: Tensor, mix: Tensor, bias: Tensor | None = None) -> Tensor:
    """`out[o] = sum_h mix[o, h] maps[h] + bias[o]`. maps `[B, H, N, N]`, mix `[H, H]`, bias `[H]`."""
    return F.conv2d(maps, mix[:, :, None, None], bias)


def batch_norm(x: Tensor, norm: HeadNorm, training: bool, norm_batch: int | None = None) -> Tensor:
    """`F.batch_norm` of `x [B, C, ...]`, in training over each group of `norm_batch` consecutive images separately
    (None: all; the last group holds the rest), so that it does not depend on how a batch is split over devices. Running
    statistics make one move, the mean over the images of their groups' moves."""
    if not training or norm_batch is None or len(x) <= norm_batch:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.gamma, norm.beta, training, norm.momentum,
                            norm.eps)
    running = [torch.zeros_like(norm.gamma) if old is None else old for old in (norm.running_mean, norm.running_var)]
    moved = [torch.zeros_like(old) for old in running]
    out = []
    for group in x.split(norm_batch):
        own = [old.clone() for old in running]
        out.append(F.batch_norm(group, *own, norm.gamma, norm.beta, True, norm.momentum, norm.eps))
        for mean, new in zip(moved, own):
            mean.add_(new, alpha=len(group) / len(x))
    for old, new in zip(running, moved):
        old.copy_(new)
    return torch.cat(out)


def exchange_heads(maps: Tensor, mix: Tensor | None = None, bias: Tensor | None = None, *,
                   norm: HeadNorm | None = None, map_scale: float = 1.0, training: bool = False,
                   norm_batch: int | None = None) -> Tensor:
    """Softmax maps `[B, H, N, N]` -> final maps: mixed over heads, normalised, scaled; each part only if given."""
    if mix is not None:
        maps = mix_heads(maps, mix, bias)
    if norm is not None:
        maps = batch_norm(maps, norm, training, norm_batch)
    return maps if map_scale == 1.0 else maps * map_scale


def reattention(q: Tensor, k: Tensor, v: Tensor, mix: Tensor | None = None, bias: Tensor | None = None, *,
                norm: HeadNorm | None = None, gain: Tensor | float = 1.0, centre: float = 0.0,
                scale: float | None = None, map_scale: float = 1.0, dropout_p: float = 0.0, training: bool = False,
                norm_batch: int | None = None) -> Tensor:
    """Re-attention of q, k, v `[B, H, N, d]` by its definition, with the maps `[B, H, N, N]` in memory.

    Args:
        mix, bias: Theta `[H, H]` (row = new head, column = source head) and its bias `[H]`; None: no mixing.
        norm: BatchNorm over heads, or None; norm_batch: see `batch_norm`.
        gain, centre: see `contrast`, which acts before dropout and mix.
        scale: factor on `q k^T`; default d^-0.5.
        map_scale: factor on the maps after the norm (the published `transform_scale`).
        dropout_p: dropout on the maps before the mix, in training only.
        training: batch statistics and dropout; else running statistics."""
    maps = F.dropout(contrast(softmax_maps(q, k, scale), gain, centre), dropout_p, training)
    return exchange_heads(maps, mix, bias, norm=norm, map_scale=map_scale, training=training, norm_batch=norm_batch) @ v


def centred_mix(q: Tensor, k: Tensor, v: Tensor, mix: Tensor, scale: float, statistics: bool) -> tuple[Tensor, ...]:
    """What every core of the affine form computes (see `affine`); this one, for exports and function transforms, keeps
    the maps. From q, k, v `[B, H, N, d]` of any strides and mix `[H, H]` in float32 (float64 if q is), with
    `C = softmax(scale q k^T) - 1/N` and `M_h = sum_g mix[h, g] C_g`: U `[B, H, N, d]` = M v in v's dtype; sumsq
    `[B, H]` = sum of M^2 over both N (zeros without `statistics`) and total `[B, H, d]` = sum of v over N in mix's."""
    maps = softmax_maps(q.to(mix.dtype), k.to(mix.dtype), scale) - 1 / k.shape[2]  # [B, H, N, N], rows sum to 0
    mixed = torch.einsum("hg,bgij->bhij", mix, maps)  # [B, H, N, N], rows sum to 0
    sumsq = mixed.square().sum(dim=(2, 3)) if statistics else mix.new_zeros(mixed.shape[:2])
    return (mixed @ v.to(mix.dtype)).to(v.dtype), sumsq, v.sum(dim=2, dtype=mix.dtype)
