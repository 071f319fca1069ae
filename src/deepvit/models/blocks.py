"""Transformer blocks: how attention and MLP are joined to the residual stream."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.layers import LayerScale, Mlp
from torch import Tensor, nn

from deepvit.errors import UserError
from deepvit.models.attention import Attention
from deepvit.models.stochastic_depth import DropPath

GELUS = {"erf": nn.GELU, "tanh": lambda: nn.GELU(approximate="tanh")}


class FeatScale(nn.Module):
    """`x + s * mean(x) + t * (x - mean(x))`, the mean over tokens, s and t learned per channel from 0.

    Reweighs what all tokens share against what tells them apart, after every attention (Wang et al., arXiv:2203.05962,
    "Anti-Oversmoothing in Deep Vision Transformers via the Fourier Domain Analysis", and its published code).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.shared = nn.Parameter(torch.zeros(dim))
        self.apart = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)  # [B, 1, D]
        return x + self.shared * mean + self.apart * (x - mean)


class Block(nn.Module):
    """Pre-norm transformer block: `x += attn(norm1(a x)) / a; x += mlp(norm2(a x)) / a`.

    Args:
        dim: D; attn: the attention; depth: the number of blocks of the model.
        residual_scale: a, the published `scale_adjustment`: as LayerNorm undoes the factor inside, a = 0.5 doubles
            both branches.
        init_values: LayerScale (Touvron et al., "Going deeper with Image Transformers", arXiv:2103.17239) on both
            branches, starting at this (0: as ReZero, arXiv:2003.04887); None: none.
        feat_scale: `FeatScale` behind the attention.
    """

    def __init__(self, dim: int, attn: Attention, mlp_ratio: float, drop: float, drop_path: float,
                 init_values: float | None, gelu: str, norm_eps: float, residual_scale: float, feat_scale: bool,
                 depth: int):
        super().__init__()
        self.residual_scale = residual_scale
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = attn
        self.feat_scale = FeatScale(dim) if feat_scale else nn.Identity()
        self.ls1 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        hidden = int(dim * mlp_ratio + 1e-6)  # 1e-6: a ratio such as 100/48 must give 100 again
        self.mlp = Mlp(dim, hidden, act_layer=GELUS[gelu], drop=drop)
        self.ls2 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, qk: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Tokens `[B, N, D]` -> `[B, N, D]`; `qk`: what the leader's `shared` gave, for a block that follows it."""
        attend = self.attn if qk is None else partial(self.attn, qk=qk)
        x = x + self.drop_path1(self._branch(self.norm1, (attend, self.feat_scale, self.ls1), x))
        return x + self.drop_path2(self._branch(self.norm2, (self.mlp, self.ls2), x))

    def shared(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q and k `[B, H, N, d]` of the tokens that enter this block, for those that follow it."""
        return self.attn.split(self.norm1(x if self.residual_scale == 1.0 else x * self.residual_scale))[:2]

    def _branch(self, norm: nn.Module, layers: Sequence[nn.Module], x: Tensor) -> Tensor:
        a = self.residual_scale
        out = norm(x) if a == 1.0 else norm(x * a)
        for layer in layers:
            out = layer(out)
        return out if a == 1.0 else out / a


class DeepNormBlock(Block):
    """Post-norm block with DeepNorm: `x = norm1(alpha x + attn(x)); x = norm2(alpha x + mlp(x))`.

    alpha = (2 L)^(1/4); the weights of v, of both projections out and of the MLP start as Xavier normal with gain
    beta = (8 L)^(-1/4), those of q and k with gain 1 (Wang et al., "DeepNet: Scaling Transformers to 1,000 Layers",
    arXiv:2203.00555, encoder-only). L = `depth`.
    """

    def __init__(self, *args, residual_scale: float, depth: int, **kwargs):
        if residual_scale != 1.0:
            raise UserError(f"block=deepnorm has its own residual factor: leave residual_scale at 1 "
                            f"(it is {residual_scale}).")
        super().__init__(*args, residual_scale=residual_scale, depth=depth, **kwargs)
        self.alpha, self.beta = (2 * depth) ** 0.25, (8 * depth) ** -0.25

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.alpha * x + self.drop_path1(self.ls1(self.feat_scale(self.attn(x)))))
        return self.norm2(self.alpha * x + self.drop_path2(self.ls2(self.mlp(x))))

    def reset_parameters(self, stream: Callable[[str], torch.Generator | None]) -> None:
        """The start of the weights that the scheme needs, each from its stream; biases and norms stay as they are."""
        generator = stream("attn.qkv.weight")
        for weight, gain in zip(self.attn.qkv.weight.detach().chunk(3), (1.0, 1.0, self.beta)):  # views: q, k, v
            nn.init.xavier_normal_(weight, gain, generator)
        for name in ("attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"):
            nn.init.xavier_normal_(self.get_parameter(name), self.beta, stream(name))


BLOCKS: dict[str, type[Block]] = {"pre_norm": Block, "deepnorm": DeepNormBlock}


def share_among(blocks: Sequence[Block], size: int, weight_init: str | None) -> None:
    """Within groups of `size` blocks all follow the first: see `Attention.follow`.

    Raises:
        UserError: groups larger than the model, or an initialisation that needs each block's own q and k.
    """
    if size > len(blocks) or weight_init or isinstance(blocks[0], DeepNormBlock):
        raise UserError(f"share_maps={size} goes with at least as many blocks (depth is {len(blocks)}), and with "
                        f"neither block=deepnorm nor weight_init: leave it at 1.")
    for i, block in enumerate(blocks):
        if i % size:
            block.attn.follow(blocks[i - i % size].attn)
