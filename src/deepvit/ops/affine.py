"""The algebra that lets re-attention run without a map in memory. Exact, for maps whose rows sum to one (no dropout).

BatchNorm over heads lies between two linear maps, so it is an affine on the *output*. With the centred maps
`C_g = A_g - 1/N`, `M_h = sum_g mix[h, g] C_g` (which has mean 0 whatever A is) and `total_h = sum_j v_h[j]`:

    U_h   = M_h v_h                              the core: one pass over the maps, see `reference.centred_mix`
    out_h = gain_h U_h + shift_h total_h
    training with norm:  gain = s gamma / sqrt(sum M^2 / n + eps),  shift = s beta,  s = map_scale,
                         the sum over the n = norm_batch N^2 entries of a group of images
    else (folded):       gain = 1, with mix and shift from `fold`

Before the mix, A may become `(1 - centre) / N + gain (A - 1/N)`: U takes `mix diag(gain)`, and the uniform part of the
maps is `(1 - centre) sum_g mix[h, g] / N`.

The core sums per image; groups are formed here and nowhere else, so gain is `[B, H]`, equal within a group. The bias
cancels in training but for the running mean. Centring before any rounding is what keeps bf16 exact."""

import torch
from torch import Tensor

from deepvit.errors import UserError
from deepvit.ops.reference import HeadNorm


def fold(mix: Tensor, bias: Tensor | None = None, norm: HeadNorm | None = None,
         map_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Evaluation in one mix and one rank-one term: `out_h = sum_g mix'[h, g] A_g v_h + shift'_h sum_j v_h[j]`. Takes
    Theta `[H, H]`, its bias `[H]` or None, a norm with running statistics (else UserError) or None; returns mix'
    `[H, H]` and shift' `[H]` in at least float32, differentiable in mix, bias, gamma and beta."""
    mix = at_least_float(mix)
    shift = mix.new_zeros(mix.shape[0]) if bias is None else bias.to(mix.dtype)
    if norm is not None:
        if norm.running_mean is None or norm.running_var is None:
            raise UserError("This head norm keeps no running statistics, so it cannot evaluate; call it in training.")
        gain = norm.gamma.to(mix.dtype) * (norm.running_var.to(mix.dtype) + norm.eps).rsqrt()  # [H]
        mix = gain[:, None] * mix
        shift = norm.beta.to(mix.dtype) + gain * (shift - norm.running_mean.to(mix.dtype))
    return (mix, shift) if map_scale == 1.0 else (mix * map_scale, shift * map_scale)


def at_least_float(t: Tensor) -> Tensor:
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def group_mean(x: Tensor, size: int | None) -> tuple[Tensor, Tensor | int]:
    """The mean of `x [B, H]` over each image's group of `size` (None: all), and its images, `[B, 1]` or one number."""
    B, H = x.shape
    if size is None:
        return x.mean(dim=0, keepdim=True).expand(B, H), B
    group = torch.arange(B, device=x.device).div(size, rounding_mode="floor")
    member = (group[:, None] == group).double()  # [B, B]: no branch on B (exports leave it open), no TF32, no atomics
    images = member.sum(dim=1, keepdim=True)  # [B, 1]
    return (member @ x.double() / images).to(x.dtype), images.to(x.dtype)


def batch_rstd(meansq: Tensor, tokens: int, mean: Tensor, norm: HeadNorm, norm_batch: int | None) -> Tensor:
    """`1 / sqrt(var + eps)`, `[B, H]`, from each image's mean of M^2 `[B, H]` over tokens^2 entries; moves the running
    statistics. `mean [H]` of the maps that the norm sees is the same in every group, as rows of A sum to one."""
    last = (meansq.shape[0] - 1) % (norm_batch or meansq.shape[0]) + 1  # images of the last group
    if tokens == 1 and last == 1:
        raise UserError("Batch statistics of one entry do not exist: train the head norm on more than one token.")
    var, images = group_mean(meansq, norm_batch)  # [B, H], biased
    if norm.running_mean is not None and norm.running_var is not None:
        count = images * tokens**2
        with torch.no_grad():  # one move, to the mean over the images: linear, so that averages of moves are exact
            unbiased = (var * (count / (count - 1))).mean(dim=0)  # [H]
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
    return (var + norm.eps).rsqrt()


def recoverable(u: Tensor, gain: Tensor, total: Tensor, shift: Tensor) -> bool:
    """Whether `U = (out - shift total) / gain` loses at most a factor 30 (2 in half precision) in its rounding. u is
    `[B, N, H d]`."""
    limit = 30 if u.dtype in (torch.float32, torch.float64) else 1
    squares = u.square().sum(dim=1, dtype=gain.dtype).view(total.shape).sum(dim=2)  # [B, H]
    signal = (gain.square() * squares).sum(dim=0)  # [H]
    noise = shift.square() * total.square().sum(dim=(0, 2))  # [H]
    return bool((signal > noise * (u.shape[1] / limit**2)).all())
