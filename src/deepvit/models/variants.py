"""Alternatives to re-attention that change the logits, which no setting of `SelfAttention` does.

Same contract as in `attention`: `maps(q, k)` says what it is, `attend(q, k, v)` may be faster, one YAML file each.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from deepvit import ops
from deepvit.models.attention import Attention, HeadMix, SelfAttention


class LearnedTemperature(SelfAttention):
    """Softmax attention with a temperature learned per head: `softmax(e^s q k^T / sqrt(d))`, s starting at 0.

    The DeepViT paper (arXiv:2103.11886) compares with a learned temperature and finds little help; Lee et al.,
    "Vision Transformer for Small-Size Datasets" (arXiv:2112.13492), use it as part of LSA. The exponential keeps it
    positive.
    """

    def __init__(self, dim: int, num_heads: int = 8, **kwargs):
        super().__init__(dim, num_heads, **kwargs)
        factory = {name: kwargs[name] for name in ("device", "dtype") if name in kwargs}
        self.log_sharpness = nn.Parameter(torch.zeros(num_heads, **factory))  # s = -ln(temperature)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().split(x)
        return q * self.log_sharpness.exp()[:, None, None].to(q.dtype), k, v


class DecayedTemperature(SelfAttention):
    """Softmax attention whose temperature falls with depth: `T = first (last / first)^(block_index / (depth - 1))`.

    The DeepViT paper (arXiv:2103.11886) compares with a temperature that decays with depth, so that deep blocks attend
    more sharply, and finds little help. It gives no numbers that we could read: 1 to 0.5, geometrically, is our choice.

    Args:
        first, last: temperatures of the first and the last block.
        block_index, depth: where this attention stands; `ViT` gives them.
    """

    def __init__(self, dim: int, num_heads: int = 8, first: float = 1.0, last: float = 0.5, block_index: int = 0,
                 depth: int = 1, **kwargs):
        super().__init__(dim, num_heads, **kwargs)
        self.temperature = first * (last / first) ** (block_index / max(1, depth - 1))
        self.scale = self.scale / self.temperature


class TalkingHeads(Attention):
    """Heads mixed before and after the softmax: `P_w softmax(P_l q k^T / sqrt(d))` (Shazeer et al., arXiv:2003.02436).

    No bias and no norm, as there. `stage="softmax"` are the maps between the two mixes. Both start as the identity,
    so as plain attention, which is our choice; `theta_init: random` draws them as re-attention's Theta.
    """

    def __init__(self, dim: int, num_heads: int = 8, theta_init: Literal["random", "identity", "normal"] = "identity",
                 **kwargs):
        super().__init__(dim, num_heads, **kwargs)
        factory = {name: kwargs[name] for name in ("device", "dtype") if name in kwargs}
        self.mix_logits = HeadMix(num_heads, bias=False, init=theta_init, **factory)
        self.mix = HeadMix(num_heads, bias=False, init=theta_init, **factory)

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return ops.mix_heads(super().logits(q, k), self.mix_logits.weight)  # [B, H, N, N]

    def softmax(self, q: Tensor, k: Tensor) -> Tensor:
        return self.logits(q, k).softmax(-1)

    def maps(self, q: Tensor, k: Tensor) -> Tensor:
        return self.scaled(ops.mix_heads(self.softmax(q, k), self.mix.weight))
