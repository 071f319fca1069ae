"""The one entrance to re-attention, which chooses how and never what; and the core of the affine form as a torch
operator: autograd and torch.compile see one node, whatever runs it."""

import importlib.util
import logging
from functools import cache, partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deepvit.errors import UserError
from deepvit.ops import affine, native, reference, tiles
from deepvit.ops.reference import HeadNorm, is_plain
from deepvit.ops.tiles import tokens_first

HALF = torch.bfloat16, torch.float16
LIFT = 64  # on U before the norm: near initialisation it is below float16's normal range, trained far from its end

log = logging.getLogger("deepvit.ops")


def reattention(q: Tensor, k: Tensor, v: Tensor, mix: Tensor | None = None, bias: Tensor | None = None, *,
                norm: HeadNorm | None = None, gain: Tensor | float = 1.0, centre: float = 0.0,
                scale: float | None = None, map_scale: float = 1.0, dropout_p: float = 0.0, training: bool = False,
                norm_batch: int | None = None) -> Tensor:
    """`reference.reattention`, with the same arguments, by the fastest path that is proven for these tensors; logs once
    which. Returns `[B, H, N, d]`, in autocast's dtype where that is on, else q's. Its gradient can be taken once."""
    device = q.device.type
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lowered = device != "meta" and torch.is_autocast_enabled(device) and q.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if lowered else q.dtype
    if mix is None and norm is None and is_plain(gain, centre):
        out = _self_attention(q, k, v, dropout_p if training else 0.0, scale, dtype)
        return out if map_scale == 1.0 else out * map_scale
    rest = {"norm": norm, "gain": gain, "centre": centre, "scale": scale, "map_scale": map_scale, "training": training,
            "norm_batch": norm_batch}
    if device == "meta":  # shapes and counts of operations, no values
        return _by_definition(q, k, v, mix, bias, dropout_p=dropout_p, **rest)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    path, why = choose(q, k, v, dropout_p=dropout_p, training=training)
    if why and not torch.compiler.is_compiling():
        kept = 4 * q.shape[1] * q.shape[2] * k.shape[2] * max(4, q.dtype.itemsize) / 1e6  # 4 maps, float32 or more
        announce(path, f"{why}; it keeps {kept:.1f} MB of maps an image and block")
    with torch.autocast(device, enabled=False):
        if path == "reference":
            return _by_definition(q, k, v, mix, bias, dropout_p=dropout_p, **rest)
        return _by_affine(path, q, k, v, mix, bias, **rest)


def _self_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, scale: float, dtype: torch.dtype) -> Tensor:
    """torch's, but in float32 where a CPU would take a half-precision backward, which is up to five times as slow."""
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout_p, scale=scale)
    if q.device.type != "cpu" or dtype not in HALF or not (torch.is_grad_enabled() and q.requires_grad):
        return attend(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return attend(*map(affine.at_least_float, (q, k, v))).to(dtype)


def choose(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, training: bool = False) -> tuple[str, str]:
    """The path for these tensors, "reference", "plain" or "core", and why not the core."""
    if training and dropout_p > 0:
        return "reference", "attention dropout needs the maps"
    if not q.shape == k.shape == v.shape:
        return "reference", "queries, keys and values differ in shape"
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "plain", "exports hold plain operations only"
    if torch._C._are_functorch_transforms_active():
        return "plain", "function transforms need plain operations"
    return "core", ""


@cache
def announce(path: str, why: str) -> None:
    """Logs a slower path once per process."""
    log.info("re-attention takes the %s path: %s", path, why)


def _by_definition(q, k, v, mix, bias, **rest) -> Tensor:
    """The reference in at least float32: half precision drowns the maps near initialisation (38 to 64 % error)."""
    wide = [None if x is None else affine.at_least_float(x) for x in (q, k, v, mix, bias)]
    return reference.reattention(*wide, **rest).to(v.dtype)


def _by_affine(path, q, k, v, mix, bias, *, norm, gain, centre, scale, map_scale, training, norm_batch) -> Tensor:
    H, N = q.shape[1:3]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if mix is None:
        mix, bias = torch.eye(H, dtype=wide, device=q.device), None
    mix = mix.to(wide)
    compute = reference.centred_mix if path == "plain" else centred_mix
    eager = path == "core" and q.device.type == "cpu" and not torch.compiler.is_compiling()
    entry = (1 - centre) / N  # of a map's uniform part
    if not training or norm is None:
        mix, shift = affine.fold(mix, bias, norm, map_scale)
        shift = shift + entry * mix.sum(dim=1)
        u, _, total = compute(q, k, v, mix if is_plain(gain, 0.0) else (mix * gain).to(wide), scale, False)[:3]
        constant = (total * shift[:, None])[:, :, None]  # [B, H, 1, d]
        if eager and not u.requires_grad:
            _flat(u).add_(_flat(constant))
            return u
        return (u + constant).to(u.dtype)
    mean = entry * mix.detach().sum(dim=1)  # [H]: the norm takes it away again
    mean = mean if bias is None else mean + bias.detach()
    mix = mix if is_plain(gain, 0.0) else (mix * gain).to(wide)
    gamma, shift = norm.gamma.to(wide), norm.beta.to(wide)
    if map_scale != 1.0:  # a product by 1 breaks inductor's recomputation (2.15)
        gamma, shift = gamma * map_scale, shift * map_scale
    if bias is not None:
        shift = shift + 0 * bias.to(wide)  # it cancels; DDP wants the gradient of zeros that it has
    if eager:
        return _Eager.apply(q, k, v, mix, gamma, shift, scale, norm, mean, norm_batch)
    u, sumsq, total = compute(q, k, v, LIFT * mix, scale, True)[:3]
    rstd = affine.batch_rstd(sumsq / (LIFT * N) ** 2, N, mean, norm, norm_batch)
    constant = (total * shift[:, None])[:, :, None]  # [B, H, 1, d]
    return torch.addcmul(constant, u, (gamma * rstd / LIFT)[:, :, None, None]).to(u.dtype)


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
    """`reference.centred_mix` and what its backward needs besides the inputs (empty except from Triton)."""
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


def _setup(ctx, inputs, output):
    q, k, v, mix, scale, _ = inputs
    ctx.save_for_backward(q, k, v, mix, output[3])
    ctx.scale = scale


def _backward(ctx, du, dsumsq, dtotal, _):
    q, k, v, mix, kept = ctx.saved_tensors
    return *centred_mix_backward(du, dsumsq, dtotal, q, k, v, mix, kept, ctx.scale), None, None


centred_mix.register_autograd(_backward, setup_context=_setup)


def _second_backward(ctx, *grads):
    raise UserError("The gradient of re-attention's fast operators can be taken once: use torch.func or ops.reference.")


centred_mix_backward.register_autograd(_second_backward)


class _Once(torch.autograd.Function):
    """Passes on its first `count` arguments, gradients; refuses their own gradients by the rest, their origins."""

    forward = staticmethod(lambda ctx, count, *tensors: tuple(x.clone() for x in tensors[:count]))
    backward = staticmethod(_second_backward)


class _Eager(torch.autograd.Function):
    """The training form with its norm as one node, for eager code on a CPU, where small operations dominate small
    models. The affine is written over U; backward takes U from it, or from a copy where rounding forbids that."""

    @staticmethod
    def forward(ctx, q, k, v, mix, gamma, shift, scale, norm, mean, norm_batch):
        mix, N = LIFT * mix, q.shape[2]
        u, sumsq, total, kept = centred_mix(q, k, v, mix, scale, True)
        rstd = affine.batch_rstd(sumsq / (LIFT * N) ** 2, N, mean, norm, norm_batch)  # [B, H]
        gain, flat = gamma * rstd / LIFT, _flat(u)
        ctx.from_out = affine.recoverable(flat, gain, total, shift)
        copy = None if ctx.from_out else u.clone()
        torch.addcmul(_flat((total * shift[:, None])[:, :, None]), flat, _flat(_wide(gain, u)), out=flat)
        ctx.scale, ctx.norm_batch = scale, norm_batch
        ctx.save_for_backward(q, k, v, mix, shift, total, kept, rstd, gain, u if ctx.from_out else copy)
        return u

    @staticmethod
    def backward(ctx, grad):
        gradients = _Eager.gradients(ctx, grad)
        if torch.is_grad_enabled():
            gradients = _Once.apply(len(gradients), *gradients, *ctx.saved_tensors, grad)
        return *gradients, None, None, None, None

    @staticmethod
    @torch.no_grad()
    def gradients(ctx, grad):
        """Of q, k, v, mix, gamma and shift."""
        q, k, v, mix, shift, total, kept, rstd, gain, held = ctx.saved_tensors
        flat = _flat(grad)
        rows = flat.sum(dim=1, dtype=total.dtype).view(total.shape)  # [B, H, d]
        dshift = (rows * total).sum(dim=2)  # [B, H]
        dgain = (flat * _flat(held)).sum(dim=1, dtype=gain.dtype).view(total.shape).sum(dim=2)  # [B, H]: by `held`
        dlog = dgain - shift * dshift if ctx.from_out else dgain * gain  # [B, H]: of log gain
        dgain = dlog / gain if ctx.from_out else dgain
        dvar, _ = affine.group_mean(dlog * rstd * rstd, ctx.norm_batch)  # [B, H], of each image's mean square
        dsumsq = dvar * (-0.5 / (LIFT * q.shape[2]) ** 2)
        du = (flat * _flat(_wide(gain, grad))).to(held.dtype).view_as(grad.transpose(1, 2)).transpose(1, 2)
        *dqkv, dmix = centred_mix_backward(du, dsumsq, rows * shift[:, None], q, k, v, mix, kept, ctx.scale)
        return *dqkv, LIFT * dmix, (dgain * rstd).sum(dim=0) / LIFT, dshift.sum(dim=0)


def _flat(x: Tensor) -> Tensor:
    """`[B, H, N, d]` as `[B, N, H d]`, whose rows are long: a view of what is laid out tokens first."""
    B, H, N, d = x.shape
    return x.transpose(1, 2).reshape(B, N, H * d)  # batched gradients have no flatten


def _wide(gain: Tensor, like: Tensor) -> Tensor:
    """`[B, H]` as `[B, H, 1, d]`."""
    return gain[:, :, None, None].expand(-1, -1, 1, like.shape[3])


# Matrix products only, as torch counts; recomputing the maps in backward counts too, as in torch's attention.

@register_flop_formula(torch.ops.deepvit.centred_mix)
def _flops(q, k, v, mix, *_, **__) -> int:
    B, H, N, d = q
    return 2 * B * H * N * N * (2 * d + H)  # `q k^T` and maps times v, the mix over heads


@register_flop_formula(torch.ops.deepvit.centred_mix_backward)
def _flops_backward(du, dsumsq, dtotal, q, *_, **__) -> int:
    B, H, N, d = q
    return 2 * B * H * N * N * (5 * d + 3 * H)  # `q k^T` and the mix again, then two products for each of the three
