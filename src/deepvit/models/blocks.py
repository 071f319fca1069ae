"""Transformer blocks: how attention and MLP join the residual stream, stochastic depth, gradient checkpointing, and the
published regularisation between the maps of neighbours."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import LayerScale, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepvit.errors import UserError
from deepvit.models.attention import Attention, SelfAttention

GELUS = {"erf": nn.GELU, "tanh": lambda: nn.GELU(approximate="tanh")}


class DropPath(timm.layers.DropPath):
    """Leaves a residual branch out for some images (Huang et al., arXiv:1603.09382), as timm's without `keep`."""

    keep: Tensor | None = None  # [B], 0 or 1 / (1 - rate) for each image of the next batch

    def forward(self, x: Tensor) -> Tensor:
        if self.keep is None or not self.training:
            return super().forward(x)
        return x * self.keep.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class FeatScale(nn.Module):
    """`x + s * mean(x) + t * (x - mean(x))`, the mean over tokens, s and t learned per channel from 0 (Wang et al.,
    arXiv:2203.05962)."""

    def __init__(self, dim: int):
        super().__init__()
        self.shared = nn.Parameter(torch.zeros(dim))
        self.apart = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)  # [B, 1, D]
        return x + self.shared * mean + self.apart * (x - mean)


class Block(nn.Module):
    """Pre-norm transformer block: `x += attn(norm1(a x)) / a; x += mlp(norm2(a x)) / a`, in a model of `depth` blocks.

    Args:
        residual_scale: a, the published `scale_adjustment`: LayerNorm undoes it inside, so 0.5 doubles the branches.
        init_values: start of LayerScale (Touvron et al., "Going deeper with Image Transformers", arXiv:2103.17239) on
            both branches (0: as ReZero, arXiv:2003.04887); None: none."""

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
        """q and k `[B, H, N, d]` of the tokens that enter this block, for the blocks that follow it."""
        return self.attn.split(self.norm1(x if self.residual_scale == 1.0 else x * self.residual_scale))[:2]

    def _branch(self, norm: nn.Module, layers: Sequence[nn.Module], x: Tensor) -> Tensor:
        a = self.residual_scale
        out = norm(x) if a == 1.0 else norm(x * a)
        for layer in layers:
            out = layer(out)
        return out if a == 1.0 else out / a


class DeepNormBlock(Block):
    """Post-norm block with DeepNorm: `x = norm1(alpha x + attn(x)); x = norm2(alpha x + mlp(x))`, alpha = (2 L)^(1/4);
    the weights of v, of both projections out and of the MLP start as Xavier normal with gain beta = (8 L)^(-1/4), those
    of q and k with gain 1 (Wang et al., "DeepNet", arXiv:2203.00555, encoder-only). L = `depth`."""

    def __init__(self, *args, residual_scale: float, depth: int, **kwargs):
        if residual_scale != 1.0:
            raise UserError(f"block=deepnorm has its own residual factor: set residual_scale={residual_scale} to 1.")
        super().__init__(*args, residual_scale=residual_scale, depth=depth, **kwargs)
        self.alpha, self.beta = (2 * depth) ** 0.25, (8 * depth) ** -0.25

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.alpha * x + self.drop_path1(self.ls1(self.feat_scale(self.attn(x)))))
        return self.norm2(self.alpha * x + self.drop_path2(self.ls2(self.mlp(x))))

    def reset_parameters(self, stream: Callable[[str], torch.Generator | None]) -> None:
        """Draws the weights that the scheme scales, each from its stream; biases and norms stay as they are."""
        generator = stream("attn.qkv.weight")
        for weight, gain in zip(self.attn.qkv.weight.detach().chunk(3), (1.0, 1.0, self.beta)):  # views: q, k, v
            nn.init.xavier_normal_(weight, gain, generator)
        for name in ("attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"):
            nn.init.xavier_normal_(self.get_parameter(name), self.beta, stream(name))


BLOCKS: dict[str, type[Block]] = {"pre_norm": Block, "deepnorm": DeepNormBlock}


def share_among(blocks: Sequence[Block], size: int, weight_init: str | None) -> None:
    """Within groups of `size` blocks all follow the first: see `Attention.follow`."""
    if size > len(blocks) or weight_init or isinstance(blocks[0], DeepNormBlock):
        raise UserError(f"share_maps={size} needs at least {size} blocks (depth is {len(blocks)}) and excludes "
                        f"block=deepnorm and weight_init: leave it at 1.")
    for i, block in enumerate(blocks):
        if i % size:
            block.attn.follow(blocks[i - i % size].attn)


def checkpoint_block(block: nn.Module, *inputs: Any) -> Tensor:
    """`block(*inputs)` that keeps only the inputs for the backward pass, and moves running statistics once."""
    attention = block.attn
    is_whole = not (attention._forward_pre_hooks or getattr(attention, "frozen", False))  # in one graph, when compiled
    if torch.compiler.is_compiling() and is_whole:  # it never repeats an update of buffers, and supports no contexts
        return checkpoint(block, *inputs, use_reentrant=False)
    return _checkpoint_eagerly(block, *inputs)


@torch.compiler.disable
def _checkpoint_eagerly(block: nn.Module, *inputs: Any) -> Tensor:
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _without_tracking(block)))


@contextmanager
def _without_tracking(block: nn.Module) -> Iterator[None]:
    attentions = [module for module in block.modules() if isinstance(module, SelfAttention)]
    for attention in attentions:
        attention.track_stats = False
    try:
        yield
    finally:
        for attention in attentions:
            attention.track_stats = True


class BranchMasks:
    """Stochastic depth's masks for all branches of a model: a function of (seed, batch index, place in the global
    batch, branch), so the same for any number of devices and micro-batches."""

    def __init__(self, model: nn.Module, seed: int, device: torch.device):
        self._branches = [module for module in model.modules() if isinstance(module, DropPath)]
        self._rates = torch.tensor([branch.drop_prob for branch in self._branches])  # [branches]
        self._seed, self._device = seed, device
        self._all = self._placed = torch.empty(0, 0)

    def draw(self, batch_index: int, batch_size: int) -> None:
        """Draws the masks of a global batch, on the host."""
        if not self._branches:
            return
        seed = self._seed * 0x9E3779B97F4A7C15 + batch_index & 2**63 - 1
        chance = torch.rand(batch_size, len(self._branches), generator=torch.Generator().manual_seed(seed))
        self._all = (chance >= self._rates) / (1 - self._rates)  # [B, branches]

    def place(self, start: int, stop: int) -> None:
        """Gives every branch the masks of images `start` to `stop` of the global batch, always in the same memory."""
        if not self._branches:
            return
        masks = self._all[start:stop].T.contiguous()  # [branches, b]
        if masks.shape != self._placed.shape:
            self._placed = torch.empty_like(masks, device=self._device)
            for branch, keep in zip(self._branches, self._placed, strict=True):
                branch.keep = keep
        self._placed.copy_(masks.pin_memory() if self._device.type == "cuda" else masks, non_blocking=True)

    def forget(self) -> None:
        """Until the next are placed, each branch draws its own, for any number of images."""
        self._placed = torch.empty(0, 0)
        for branch in self._branches:
            branch.keep = None


def cosine_regularisation(maps: Sequence[Tensor]) -> Tensor:
    """The mean cosine of the final maps `[B, H, N, N]` of neighbouring blocks, 0.1 times which the published code adds
    to the loss. As in its `loss/cross_entropy.py`, and unlike the paper's similarity (per head and token), the cosine
    is taken over the *head* axis at every entry of the maps."""
    return torch.stack([F.cosine_similarity(one, other, dim=1).mean() for one, other in pairwise(maps)]).mean()


@contextmanager
def record_maps(model: nn.Module, first: int) -> Iterator[list[Tensor]]:
    """`with record_maps(model, first=4) as maps: logits = model(x)`: afterwards `maps` holds the final maps
    `[B, H, N, N]` of the first 4 blocks, float32, with gradients, in training by this batch's statistics, without
    dropout on the maps. Hooks record the inputs of the attention modules, which are asked for their maps afterwards,
    outside of any checkpointed region, and move no statistics. UserError: fewer blocks."""
    modules = [module for module in model.modules() if isinstance(module, Attention)][:first]
    if len(modules) < first:
        raise UserError(f"The maps of {first} blocks are wanted, and the model has {len(modules)}: ask for fewer.")
    inputs: dict[nn.Module, Tensor] = {}
    maps: list[Tensor] = []
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(lambda at, args: inputs.update({at: args[0]})))
        yield maps
    with torch.autocast(next(model.parameters()).device.type, enabled=False):  # bf16 loses near-uniform maps
        maps += [module.weights(inputs[module.source].float()) for module in modules]
