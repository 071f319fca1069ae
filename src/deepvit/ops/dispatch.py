"""The one entrance to re-attention: chooses how, never what."""

import torch
import torch.nn.functional as F
from torch import Tensor

from deepvit.ops import affine, core, plain, reference
from deepvit.ops.reference import HeadNorm, is_plain

LIFT = 64  # on U before the norm: near initialisation it is below float16's normal range, trained far from its end


def choose(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, training: bool = False) -> tuple[str, str]:
    """The path for these tensors, "reference", "plain" or "core", and why not the core, in words."""
    if training and dropout_p > 0:
        return "reference", "attention dropout needs the maps"
    if not q.shape == k.shape == v.shape:
        return "reference", "queries, keys and values differ in shape"
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "plain", "exports hold plain operations only"
    if torch._C._are_functorch_transforms_active():
        return "plain", "function transforms need plain operations"
    return "core", ""


def reattention(q: Tensor, k: Tensor, v: Tensor, mix: Tensor | None = None, bias: Tensor | None = None, *,
                norm: HeadNorm | None = None, gain: Tensor | float = 1.0, centre: float = 0.0,
                scale: float | None = None, map_scale: float = 1.0, dropout_p: float = 0.0, training: bool = False,
                norm_batch: int | None = None) -> Tensor:
    """`reference.reattention` by the fastest path that is proven for these tensors; logs which, once.

    Args:
        all of them: as in `reference.reattention`.
    Returns:
        `[B, H, N, d]`, in autocast's dtype where that is on, else q's. Its gradient can be taken once.
    """
    device = q.device.type
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mix is None and norm is None and is_plain(gain, centre):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p if training else 0.0, scale=scale)
        return out if map_scale == 1.0 else out * map_scale
    rest = {"norm": norm, "gain": gain, "centre": centre, "scale": scale, "map_scale": map_scale, "training": training,
            "norm_batch": norm_batch}
    if device == "meta":  # shapes and counts of operations, no values
        return _by_definition(q, k, v, mix, bias, dropout_p=dropout_p, **rest)
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    path, why = choose(q, k, v, dropout_p=dropout_p, training=training)
    if why and not torch.compiler.is_compiling():
        core.announce(path, f"{why}; it keeps {_map_megabytes(q, k):.1f} MB of maps an image and block")
    with torch.autocast(device, enabled=False):
        if path == "reference":
            return _by_definition(q, k, v, mix, bias, dropout_p=dropout_p, **rest)
        return _by_affine(path, q, k, v, mix, bias, **rest)


def _map_megabytes(q: Tensor, k: Tensor) -> float:
    """What autograd keeps for each image: softmax, dropped out, mixed and normalised maps, of at least float32."""
    return 4 * q.shape[1] * q.shape[2] * k.shape[2] * max(4, q.dtype.itemsize) / 1e6


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
    by_batch = training and norm is not None
    if not by_batch:
        mix, shift = affine.fold(mix, bias, norm, map_scale)
    uniform = (1 - centre) * mix.sum(dim=1) / N  # [H], the mean of the mixed maps
    mix = mix if is_plain(gain, 0.0) else mix * gain
    compute = plain.centred_mix if path == "plain" else core.centred_mix
    if not by_batch:
        u, _, total = compute(q, k, v, mix, scale, False)[:3]
        return affine.affine_out(u, None, total, shift + uniform)
    u, sumsq, total = compute(q, k, v, LIFT * mix, scale, True)[:3]
    mean = uniform if bias is None else uniform + bias.to(wide)
    gains = affine.batch_gain(sumsq / LIFT**2, N, mean, norm, norm_batch, map_scale) / LIFT
    shift = norm.beta.to(wide)
    shift = shift if map_scale == 1.0 else shift * map_scale  # a product by 1 breaks inductor's recomputation (2.15)
    if bias is not None:
        shift = shift + 0 * bias.to(wide)  # it cancels; DDP wants the gradient of zeros that it has
    return affine.normalised(u, gains, total, shift)
