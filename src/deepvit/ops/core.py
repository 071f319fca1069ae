"""The core of the affine form as a torch operator: autograd and torch.compile see one node, whatever runs it."""

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deepvit.errors import UserError
from deepvit.ops import cpu, native
from deepvit.ops.plain import tokens_first

log = logging.getLogger("deepvit.ops")
HAS_TRITON = importlib.util.find_spec("triton") is not None


@cache
def announce(path: str, why: str) -> None:
    """Log a path once in the life of the process."""
    log.info("re-attention takes the %s path: %s", path, why)


@cache
def _triton():
    from deepvit.ops import triton_core  # imported where it is first needed: triton takes a second, and may be missing
    return triton_core


def triton_refuses(q: Tensor) -> str:
    """Why Triton's kernels do not serve q; empty if they do."""
    return _triton().serves(q) if HAS_TRITON else "triton is not installed"


def _on_cpu(q: Tensor):
    """The module that computes q's dtype on a CPU: compiled where it can be, else in tiles of plain PyTorch."""
    library, why = native.load()
    if library is None or q.dtype == torch.float64:
        announce("cpu tiles", why or "the compiled form has no float64")
        return cpu
    announce("cpu native", "compiled once by this machine's g++")
    return native


@torch.library.custom_op("deepvit::centred_mix", mutates_args=(), device_types="cpu")
def centred_mix(q: Tensor, k: Tensor, v: Tensor, mix: Tensor, scale: float,
                statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`plain.centred_mix` and, as a fourth, what its backward wants besides the inputs (empty on a CPU)."""
    with torch.autocast("cpu", enabled=False):
        return *_on_cpu(q).centred_mix(q, k, v, mix, scale, statistics), mix.new_empty(0)


@torch.library.custom_op("deepvit::centred_mix_backward", mutates_args=(), device_types="cpu")
def centred_mix_backward(du: Tensor, dsumsq: Tensor, dtotal: Tensor, q: Tensor, k: Tensor, v: Tensor, mix: Tensor,
                         kept: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and mix; the arguments as in `cpu.centred_mix_backward`."""
    with torch.autocast("cpu", enabled=False):
        return _on_cpu(q).centred_mix_backward(du, dsumsq, dtotal, q, k, v, mix, scale)


@centred_mix.register_kernel("cuda")
def _(q, k, v, mix, scale, statistics):
    announce("triton", "kernels that keep the maps on the chip")
    with torch.autocast("cuda", enabled=False), torch.cuda.device_of(q):
        return _triton().centred_mix(q, k, v, mix, scale, statistics)


@centred_mix_backward.register_kernel("cuda")
def _(du, dsumsq, dtotal, q, k, v, mix, kept, scale):
    with torch.autocast("cuda", enabled=False), torch.cuda.device_of(q):
        return _triton().centred_mix_backward(du, dsumsq, dtotal, q, k, v, mix, kept, scale)


@centred_mix.register_fake
def _(q, k, v, mix, scale, statistics):
    B, H, N, d = q.shape
    kept = mix.new_empty(0) if q.device.type == "cpu" else mix.new_empty(B, H, N)
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
