"""The algebra that lets re-attention run without a map in memory. Exact, for maps whose rows sum to one (no dropout).

BatchNorm over heads stands between two linear maps, so it is an affine on the *output*. With the centred maps
`C_g = A_g - 1/N`, `M_h = sum_g mix[h, g] C_g` (which has mean 0 whatever A is) and `total_h = sum_j v_h[j]`:

    U_h   = M_h v_h                              the core: one pass over the maps, see `plain.centred_mix`
    out_h = gain_h U_h + shift_h total_h
    training with norm:  gain = s gamma / sqrt(sum M^2 / n + eps),  shift = s beta,  n = B N^2, s = map_scale
    else (folded):       gain = 1, with mix and shift from `fold`

The bias cancels in training but for the running mean. Centring before any rounding is what keeps bf16 exact.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from deepvit.errors import UserError
from deepvit.ops.reference import HeadNorm


def fold(mix: Tensor, bias: Tensor | None = None, norm: HeadNorm | None = None,
         map_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Evaluation in one mix and one rank-one term: `out_h = sum_g mix'[h, g] A_g v_h + shift'_h sum_j v_h[j]`.

    Args:
        mix, bias: Theta `[H, H]` and its bias `[H]` or None; norm: with running statistics, or None.
    Returns:
        mix' `[H, H]` and shift' `[H]`, in at least float32; differentiable in mix, bias, gamma and beta.
    Errors:
        UserError if the norm keeps no running statistics.
    """
    mix = at_least_float(mix)
    shift = mix.new_zeros(mix.shape[0]) if bias is None else bias.to(mix.dtype)
    if norm is not None:
        if norm.running_mean is None or norm.running_var is None:
            raise UserError("This head norm keeps no running statistics, so it cannot evaluate; call it in training.")
        gain = norm.gamma.to(mix.dtype) * (norm.running_var.to(mix.dtype) + norm.eps).rsqrt()  # [H]
        mix = gain[:, None] * mix
        shift = norm.beta.to(mix.dtype) + gain * (shift - norm.running_mean.to(mix.dtype))
    return mix * map_scale, shift * map_scale


def at_least_float(t: Tensor) -> Tensor:
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = local.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def batch_gain(sumsq: Tensor, count: int, mix: Tensor, bias: Tensor | None, tokens: int, norm: HeadNorm,
               map_scale: float, group: dist.ProcessGroup | None) -> Tensor:
    """`gain [H]` from this batch's `sumsq [H] = sum M^2` over `count` entries; updates the running statistics.

    With `group`, the statistics are those of all its ranks: H sums and their count go round in forward, as many
    gradients in backward. The mean depends on parameters alone, so it is the same everywhere.
    """
    if group is None and count == 1:
        raise UserError("Batch statistics of one entry do not exist: train the head norm on more than one token.")
    if group is not None:
        sums = _SumOverRanks.apply(torch.cat([sumsq, sumsq.new_full((1,), count)]), group)
        sumsq, count = sums[:-1], sums[-1]
    var = sumsq / count  # [H], biased
    if norm.running_mean is not None and norm.running_var is not None:
        update_running(norm, var, count, mix, bias, tokens)
    return norm.gamma.to(var.dtype) * (var + norm.eps).rsqrt() * map_scale


@torch.no_grad()
def update_running(norm: HeadNorm, var: Tensor, count: int | Tensor, mix: Tensor, bias: Tensor | None,
                   tokens: int) -> None:
    mean = mix.sum(dim=1) / tokens  # [H], exact: rows of A sum to one
    mean = mean if bias is None else mean + bias.to(mean.dtype)
    unbiased = var * (count / (count - 1))
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)


class _AffineInPlace(torch.autograd.Function):
    """`gain_h U_h + shift_h total_h` written over U. Keeps its own output for the backward, which the next layer
    keeps anyway, instead of U; U itself only where the output has lost it (`_recoverable`)."""

    @staticmethod
    def forward(ctx, u: Tensor, gain: Tensor, total: Tensor, shift: Tensor) -> Tensor:
        ctx.from_out = _recoverable(u, gain, total, shift)
        kept = None if ctx.from_out else u.clone()
        out = affine_out(u, gain, total, shift, out=u)
        ctx.mark_dirty(u)
        ctx.save_for_backward(out if ctx.from_out else kept, gain, total, shift)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kept, gain, total, shift = ctx.saved_tensors
        rows = grad.sum(dim=2, dtype=total.dtype)  # [B, H, d]
        dshift = (rows * total).sum(dim=(0, 2))  # [H]
        dgain = (grad * kept).sum(dim=(0, 2), dtype=gain.dtype).sum(dim=-1)  # [H], so far against what was kept
        dgain = (dgain - shift * dshift) / gain if ctx.from_out else dgain
        return (grad * gain[:, None, None]).to(kept.dtype), dgain, rows * shift[:, None], dshift


def _recoverable(u: Tensor, gain: Tensor, total: Tensor, shift: Tensor) -> bool:
    """Whether `U = (out - shift total) / gain` loses at most a factor 30 (2 in half precision) in its rounding."""
    limit = 30 if u.dtype in (torch.float32, torch.float64) else 1
    columns = u.transpose(1, 2).flatten(0, 1).flatten(1)  # [B N, H d], a view of u as the core lays it out
    columns = torch.linalg.vector_norm(columns, dim=0, dtype=gain.dtype)
    signal = gain.abs() * torch.linalg.vector_norm(columns.view(u.shape[1], -1), dim=1)  # [H]
    noise = shift.abs() * torch.linalg.vector_norm(total, dim=(0, 2)) * u.shape[2] ** 0.5  # [H]
    return bool((signal * limit > noise).all())


def affine_out(u: Tensor, gain: Tensor | None, total: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """`gain_h u_h + shift_h total_h` in u's dtype. u `[B, H, N, d]`, gain (None: 1), shift `[H]`, total `[B, H, d]`."""
    constant = (total * shift[:, None])[:, :, None]  # [B, H, 1, d]
    if gain is None:
        return torch.add(u, constant, out=out).to(u.dtype)
    return torch.addcmul(constant, u, gain[:, None, None], out=out).to(u.dtype)


def normalised(u: Tensor, gain: Tensor, total: Tensor, shift: Tensor) -> Tensor:
    """The affine of training, `[B, H, N, d]`. Eager CPU code may overwrite u; everything else leaves it be."""
    if u.device.type == "cpu" and not torch.compiler.is_compiling():
        return _AffineInPlace.apply(u, gain, total, shift)
    return affine_out(u, gain, total, shift)
