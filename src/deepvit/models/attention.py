"""Attention as interchangeable modules. Each has `forward(x)`, which may be fused, and `weights(x)`, which defines it.
One law holds for all, in eval mode: `merge(weights(x) @ v) == forward(x)`, where `q, k, v = split(x)` (of the leader's
x, if maps are shared). A variant is a YAML file in `conf/model/attention` with settings of `SelfAttention`; what these
do not express (another rule for the logits, a norm across heads at each entry) is a subclass of `Attention`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepvit import ops
from deepvit.errors import UserError

ATTENTIONS: dict[str, type["Attention"]] = {}  # class name -> class, filled as the classes are defined
Stage = Literal["final", "softmax", "logits"]
Start = Literal["random", "identity", "normal"]  # of Theta
Part = bool | Literal["frozen"]


class Attention(nn.Module):
    """Multi-head attention over tokens: qkv projection, a rule for the maps, output projection. A subclass defines
    `maps(q, k)`, the final maps `[B, H, N, N]`, and a faster `attend(q, k, v)` if it has one.

    Args:
        dim, num_heads, head_dim: width D of the tokens, H, width of a head (default D / H).
        qkv_bias, proj_bias: biases of the two projections.
        qk_scale: factor on `q k^T`; default head_dim^-0.5.
        attn_drop, proj_drop: dropout rates on the maps and after the output projection.
        map_scale: factor on the final maps (the published `transform_scale`).
        qk_norm: `norm_layer` (LayerNorm) on each head's q and k (Dehghani et al., arXiv:2302.05442).
        scale_norm: part of timm's `attn_layer`, refused if switched on."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        ATTENTIONS[cls.__name__] = cls

    def __init__(self, dim: int, num_heads: int = 8, head_dim: int | None = None, qkv_bias: bool = True,
                 qk_scale: float | None = None, attn_drop: float = 0.0, proj_drop: float = 0.0,
                 map_scale: float = 1.0, proj_bias: bool = True, qk_norm: bool = False, scale_norm: bool = False,
                 norm_layer: type | None = None, device=None, dtype=None):
        super().__init__()
        if scale_norm:
            raise UserError(f"{type(self).__name__} has no scale_norm: leave it off.")
        if head_dim is None and dim % num_heads:
            raise UserError(f"The width {dim} does not divide into {num_heads} heads: change num_heads or embed_dim.")
        self.factory = factory = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, head_dim or dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.map_scale, self.attn_drop = map_scale, attn_drop
        inner = self.num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias, **factory)  # rows: all q, all k, all v; heads outer
        self.qk_norm = qk_norm
        make_norm = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        self.q_norm, self.k_norm = (make_norm(self.head_dim, **factory) if qk_norm else nn.Identity() for _ in "qk")
        self.proj = nn.Linear(inner, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self._leader: tuple[Attention, ...] = ()  # in a tuple, so that it is no submodule

    source = property(lambda self: self._leader[0] if self._leader else self)  # whose input makes the maps

    def follow(self, leader: "Attention") -> None:
        """From now on q and k are `leader`'s, handed to `forward`. UserError if either has maps other than softmax."""
        for attention in (self, leader):
            if (type(attention).split, type(attention).softmax) != (Attention.split, Attention.softmax):
                raise UserError(f"{type(attention).__name__} has no plain softmax maps: leave share_maps at 1.")
        self._leader, self.scale, own = (leader,), leader.scale, self.qkv
        self.v = nn.Linear(own.in_features, own.out_features // 3, own.bias is not None, **self.factory)
        self.qkv = self.q_norm = self.k_norm = None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `[B, N, D]` -> q, k, v, each `[B, H, N, d]` (without `qk_norm` views of one tensor)."""
        B, N, _ = x.shape
        if self._leader:
            return *self.source.split(x)[:2], self.values(x)
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def values(self, x: Tensor) -> Tensor:
        """A follower's v `[B, H, N, d]`."""
        return self.v(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def merge(self, heads: Tensor) -> Tensor:
        """Heads' outputs `[B, H, N, d]` -> tokens `[B, N, D]`."""
        return self.proj_drop(self.proj(heads.transpose(1, 2).flatten(2)))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
                qk: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Tokens `[B, N, D]` -> `[B, N, D]`. Masks are part of timm's call and refused; `qk`: a follower's leader's."""
        if attn_mask is not None or is_causal:
            raise UserError(f"{type(self).__name__} takes no attention mask.")
        if self._leader and qk is None:
            raise UserError("This attention follows another block's (share_maps): call the whole model.")
        return self.merge(self.attend(*qk, self.values(x)) if self._leader else self.attend(*self.split(x)))

    def weights(self, x: Tensor, stage: Stage = "final") -> Tensor:
        """The maps `[B, H, N, N]` (rows: queries) that multiply v, or what they are before the heads are mixed
        ("softmax") or the softmax is taken ("logits"); without attention dropout. Moves no running statistics."""
        q, k, _ = self.split(x)
        return {"logits": self.logits, "softmax": self.softmax, "final": self.maps}[stage](q, k)

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return q * self.scale @ k.mT  # [B, H, N, N]

    def softmax(self, q: Tensor, k: Tensor) -> Tensor:
        return ops.softmax_maps(q, k, self.scale)  # [B, H, N, N], rows sum to 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v `[B, H, N, d]` -> `[B, H, N, d]`; by default straight from the definition."""
        return F.dropout(self.maps(q, k), self.attn_drop, self.training) @ v

    def scaled(self, x: Tensor) -> Tensor:
        """Final maps, or heads' outputs, times `map_scale`."""
        return x if self.map_scale == 1.0 else x * self.map_scale


class HeadMix(nn.Module):
    """The learned mix of heads Theta: `weight` `[H, H]` (row = new head, column = source head), `bias` `[H]`."""

    def __init__(self, num_heads: int, bias: bool = True, init: str = "random", device=None, dtype=None):
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.empty(num_heads, num_heads, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, stream: Callable[[str], torch.Generator | None] = lambda name: None) -> None:
        """`random`: U(+-1/sqrt(H)), as the published 1x1 convolution; `normal`: N(0, 1), as vit-pytorch; `identity`:
        the heads unmixed. `stream` gives each parameter's generator by its name."""
        bound = 1 / math.sqrt(len(self.weight))
        draw = {"random": lambda weight: nn.init.uniform_(weight, -bound, bound, stream("weight")),
                "normal": lambda weight: nn.init.normal_(weight, generator=stream("weight")),
                "identity": nn.init.eye_}
        draw[self.init](self.weight)
        if self.bias is not None:
            random = self.init == "random"
            nn.init.uniform_(self.bias, -bound, bound, stream("bias")) if random else nn.init.zeros_(self.bias)


class SelfAttention(Attention):
    """Softmax attention (Vaswani et al., arXiv:1706.03762), with operations on its maps A, all off by default:
    `norm(Theta ((1 - centre) / N + gain (A - 1/N)) + bias) * map_scale`. Self-attention, AttnScale, centred attention,
    re-attention and everything between them are settings of this. Without dropout on the maps nothing of size N x N is
    kept: see `ops`. UserError: settings that undo each other.

    Args:
        gain: factor on A - 1/N, the part of the maps that distinguishes tokens.
        learn_gain: it becomes `gain (1 + contrast)`, contrast learned per head from 0 (Adam hardly moves a raw 300).
        centre: the share of the uniform map 1/N that is subtracted, from 0 to 1.
        mix: learn Theta and its bias; "frozen": they stay as drawn.
        theta_init: see `HeadMix.reset_parameters`.
        norm: BatchNorm over heads after the mix; "frozen": with the statistics of the first training batch.
        norm_eps: its eps. Near initialisation the maps' variance is far below 1e-5: the norm is a gain 1 / sqrt(eps).
        norm_batch: consecutive images that share batch statistics, on any devices (None: the batch the module sees)."""

    def __init__(self, dim: int, num_heads: int = 8, gain: float = 1.0, learn_gain: bool = False, centre: float = 0.0,
                 mix: Part = False, theta_init: Start = "random", norm: Part = False, norm_eps: float = 1e-5,
                 norm_batch: int | None = None, **kwargs):
        super().__init__(dim, num_heads, **kwargs)
        if norm_batch is not None and norm_batch < 1:
            raise UserError(f"norm_batch={norm_batch} must be at least 1 image, or null for the whole batch.")
        if norm and (learn_gain or not ops.is_plain(gain, centre)):
            raise UserError("norm excludes gain, learn_gain and centre: leave them out, or set norm=false.")
        self.gain, self.centre, self.norm_batch, self.frozen = gain, centre, norm_batch, norm == "frozen"
        if self.frozen and self.attn_drop:
            raise UserError("norm=frozen excludes dropout on the maps: set attn_drop_rate (or attn_drop) to 0.")
        self.contrast = nn.Parameter(torch.zeros(num_heads, **self.factory)) if learn_gain else None
        self.mix = HeadMix(num_heads, init=theta_init, **self.factory) if mix else None
        if mix == "frozen":
            self.mix.requires_grad_(False)
        momentum = 1.0 if self.frozen else 0.1
        self.norm = nn.BatchNorm2d(num_heads, norm_eps, momentum, **self.factory) if norm else None
        self.track_stats = True  # off while a checkpointed block is recomputed: see `blocks.checkpoint_block`

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        by_batch, track = self._by_batch, self.track_stats
        if track and self.norm is not None and self.norm.training:
            self.norm.num_batches_tracked.add_(1)
        return ops.reattention(q, k, v, *self._theta(), norm=self._head_norm(track), gain=self._gain(),
                               centre=self.centre, scale=self.scale, map_scale=self.map_scale, training=by_batch,
                               dropout_p=self.attn_drop if self.training else 0.0, norm_batch=self.norm_batch)

    def maps(self, q: Tensor, k: Tensor) -> Tensor:
        maps = ops.contrast(self.softmax(q, k), self._gain(), self.centre)
        return ops.exchange_heads(maps, *self._theta(), norm=self._head_norm(track=False), map_scale=self.map_scale,
                                  training=self._by_batch, norm_batch=self.norm_batch)

    @property
    def _by_batch(self) -> bool:
        """Whether the norm takes batch statistics: its own mode, as any BatchNorm's, and, frozen, before it has any."""
        if self.norm is None:
            return self.training
        counted = 0 if self.track_stats else 1  # by the pass that is being recomputed
        return self.norm.training and not (self.frozen and int(self.norm.num_batches_tracked) > counted)

    def _gain(self) -> Tensor | float:
        return self.gain if self.contrast is None else self.gain * (1 + self.contrast)  # [H]

    def _theta(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.mix is None else (self.mix.weight, self.mix.bias)

    def _head_norm(self, track: bool) -> ops.HeadNorm | None:
        """The norm as tensors; in training without `track` with copies of its statistics, which take the update."""
        if self.norm is None:
            return None
        norm = ops.HeadNorm.of(self.norm)
        if self.norm.training and not track:
            return norm._replace(running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone())
        return norm


class ReAttention(SelfAttention):
    """Re-attention: the softmax maps mixed over heads by Theta, then BatchNorm over heads (arXiv:2103.11886, eq. 3).
    All arguments are `SelfAttention`'s."""

    def __init__(self, dim: int, num_heads: int = 8, mix: Part = True, norm: Part = True, **kwargs):
        super().__init__(dim, num_heads, mix=mix, norm=norm, **kwargs)


class AttnScale(SelfAttention):
    """`1/N + (1 + w) (A - 1/N)`, w learned per head from 0 (Wang et al., "Anti-Oversmoothing in Deep Vision
    Transformers via the Fourier Domain Analysis", arXiv:2203.05962, and its published code)."""

    def __init__(self, dim: int, num_heads: int = 8, learn_gain: bool = True, **kwargs):
        super().__init__(dim, num_heads, learn_gain=learn_gain, **kwargs)


class ReAttentionLN(Attention):
    """Re-attention with LayerNorm over the head axis at each map entry, as in vit-pytorch and DeepViT-flax. The mix has
    no bias; dropout acts on the softmax maps before the mix (vit-pytorch since 0.30)."""

    def __init__(self, dim: int, num_heads: int = 8, theta_init: Start = "normal", norm_eps: float = 1e-5, **kwargs):
        super().__init__(dim, num_heads, **kwargs)
        self.mix = HeadMix(num_heads, bias=False, init=theta_init, **self.factory)
        self.norm = nn.LayerNorm(num_heads, eps=norm_eps, **self.factory)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._exchange(F.dropout(self.softmax(q, k), self.attn_drop, self.training)) @ v

    def maps(self, q: Tensor, k: Tensor) -> Tensor:
        return self._exchange(self.softmax(q, k))

    def _exchange(self, maps: Tensor) -> Tensor:
        mixed = ops.mix_heads(maps, self.mix.weight)  # [B, H, N, N]
        return self.scaled(self.norm(mixed.movedim(1, -1)).movedim(-1, 1))


class LearnedTemperature(SelfAttention):
    """Softmax attention with a temperature learned per head: `softmax(e^s q k^T / sqrt(d))`, s starting at 0. Of little
    help in the DeepViT paper (arXiv:2103.11886); part of LSA in Lee et al. (arXiv:2112.13492)."""

    def __init__(self, dim: int, num_heads: int = 8, **kwargs):
        super().__init__(dim, num_heads, **kwargs)
        self.log_sharpness = nn.Parameter(torch.zeros(num_heads, **self.factory))  # s = -ln(temperature)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().split(x)
        return q * self.log_sharpness.exp()[:, None, None].to(q.dtype), k, v


class DecayedTemperature(SelfAttention):
    """Softmax attention whose temperature falls with depth, `T = first (last / first)^(block_index / (depth - 1))`, so
    that deep blocks attend more sharply; `ViT` gives block_index and depth. Of little help in the DeepViT paper
    (arXiv:2103.11886), which gives no numbers: 1 to 0.5 is our choice."""

    def __init__(self, dim: int, num_heads: int = 8, first: float = 1.0, last: float = 0.5, block_index: int = 0,
                 depth: int = 1, **kwargs):
        super().__init__(dim, num_heads, **kwargs)
        self.temperature = first * (last / first) ** (block_index / max(1, depth - 1))
        self.scale = self.scale / self.temperature


class TalkingHeads(Attention):
    """Heads mixed before and after the softmax: `P_w softmax(P_l q k^T / sqrt(d))` (Shazeer et al., arXiv:2003.02436),
    as there without bias and norm. By default, our choice, both mixes start as the identity."""

    def __init__(self, dim: int, num_heads: int = 8, theta_init: Start = "identity", **kwargs):
        super().__init__(dim, num_heads, **kwargs)
        self.mix_logits = HeadMix(num_heads, bias=False, init=theta_init, **self.factory)
        self.mix = HeadMix(num_heads, bias=False, init=theta_init, **self.factory)

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return ops.mix_heads(super().logits(q, k), self.mix_logits.weight)  # [B, H, N, N]

    def softmax(self, q: Tensor, k: Tensor) -> Tensor:
        return self.logits(q, k).softmax(-1)

    def maps(self, q: Tensor, k: Tensor) -> Tensor:
        return self.scaled(ops.mix_heads(self.softmax(q, k), self.mix.weight))
