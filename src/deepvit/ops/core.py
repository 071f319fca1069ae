"""The core of the affine form as a torch operator: autograd and torch.compile see one node, whatever runs it."""

import importlib.util
import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deepvit.errors import UserError
from deepvit.ops import native, tiles
from deepvit.ops.plain import tokens_first

log = logging.getLogger("deepvit.ops")


@cache
def announce(path: str, why: str) -> None:
    """Log a slower path once in the life of the process."""
    log.info("re-attention takes the %s path: %s", path, why)


@cache
def _form(device: torch.device, dtype: torch.dtype, heads: int, width: int) -> ModuleType:
    """The module that computes such tensors: a kernel if one serves them, else tiles of PyTorch."""
    if device.type == "cpu":
        kernel, why = native, native.refusal(dtype)
    elif device.type == "cuda" and importlib.util.find_spec("triton"):
        from deepvit.ops import triton_core as kernel  # where it is first needed: triton takes a second
        why = kernel.refusal(device, dtype, heads, width)
    else:
        kernel, why = None, f"there is no kernel for {device.type} without triton"
    if why:
        announce("tiles", f"{why}; slower than a kernel, and keeps no map either")
        return tiles
    log.debug("re-attention in %s on %s: %s", dtype, device, kernel.__name__)
    return kernel


def _form_of(q: Tensor) -> ModuleType:
    return _form(q.device, q.dtype, int(q.shape[1]), int(q.shape[3]))


@torch.library.custom_op("deepvit::centred_mix", mutates_args=())
def centred_mix(q: Tensor, k: Tensor, v: Tensor, mix: Tensor, scale: float,
                statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`plain.centred_mix` and, as a fourth, what its backward wants besides the inputs (empty but from Triton)."""
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        u, sumsq, total, *kept = _form_of(q).centred_mix(q, k, v, mix, scale, statistics)
    return u, sumsq, total, kept[0] if kept else mix.new_empty(0)


@torch.library.custom_op("deepvit::centred_mix_backward", mutates_args=())
def centred_mix_backward(du: Tensor, dsumsq: Tensor, dtotal: Tensor, q: Tensor, k: Tensor, v: Tensor, mix: Tensor,
                         kept: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and mix; the arguments as in `tiles.centred_mix_backward`."""
    extra = [kept] if kept.numel() else []
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        return _form_of(q).centred_mix_backward(du, dsumsq, dtotal, q, k, v, mix, *extra, scale)


@centred_mix.register_fake
def _(q, k, v, mix, scale, statistics):
    B, H, N, d = q.shape
    kept = mix.new_empty(0) if _form_of(q) in (native, tiles) else mix.new_empty(B, H, N)
    return tokens_first(q), mix.new_empty(B, H), mix.new_empty(B, H, d), kept


@centred_mix_backward.register_fake
def _(du, dsumsq, dtotal, q, k, v, mix, kept, scale):
    return *(tokens_first(x) for x in (q, k, v)), mix.new_empty(mix.shape)


def _setup(ctx, inputs, output) -> None:
    q, k, v, mix, scale, _ = inputs
    ctx.save_for_backward(q, k, v, mix, output[3])
    ctx.scale = scale


def _backward(ctx, du, dsumsq, dtotal, _):
    q, k, v, mix, kept = ctx.saved_tensors
    return *centred_mix_backward(du, dsumsq, dtotal, q, k, v, mix, kept, ctx.scale), None, None


centred_mix.register_autograd(_backward, setup_context=_setup)


def _second_backward(ctx, *grads):
    raise UserError("The gradient of re-attention's fast operators can be taken once: for a second derivative use "
                    "torch.func (grad of grad, hessian), which runs plain operations, or deepvit.ops.reference.")


centred_mix_backward.register_autograd(_second_backward)


# Matrix products only, as torch counts; a backward that computes the maps anew counts those too, as torch's attention.

@register_flop_formula(torch.ops.deepvit.centred_mix)
def _flops(q, k, v, mix, *_, **__) -> int:
    """Operations for these shapes: `q k^T`, the mix over heads, maps times v."""
    B, H, N, d = q
    return 2 * B * H * N * N * (2 * d + H)


@register_flop_formula(torch.ops.deepvit.centred_mix_backward)
def _flops_backward(du, dsumsq, dtotal, q, *_, **__) -> int:
    """`q k^T` and the mix anew; then two products each for q k^T, the mix and maps times v."""
    B, H, N, d = q
    return 2 * B * H * N * N * (5 * d + 3 * H)
