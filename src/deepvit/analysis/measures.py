"""What a block's attention does, as numbers: entropy, distance, rank; and the norm and the head mix behind it.

Maps are `[B, H, N, N]`, rows queries. Each measure of maps gives one number per head, `[H]`, the mean over pictures.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # plain and synchronised

from deepvit.analysis.recording import attention_modules, unwrap
from deepvit.errors import UserError
from deepvit.models.attention import HeadMix


def attention_entropy(maps: Tensor) -> Tensor:
    """Mean entropy of the rows, `-sum_j a_ij ln a_ij`, in nats: 0 looks at one token, ln N at all alike. `[H]`.

    For maps whose rows are distributions, so `stage="softmax"`.

    Raises:
        UserError: the maps have negative entries.
    """
    if (maps < 0).any():
        raise UserError("The entropy of maps with negative entries is not defined: take them at stage='softmax'.")
    return torch.special.entr(maps).sum(-1).mean((0, 2))


def attention_distance(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean distance between a patch and the patches it attends to, weighted by attention, in patches. `[H]`.

    Dosovitskiy et al., arXiv:2010.11929, figure 7 (there in pixels): `sum_j a_ij |r_i - r_j| / sum_j a_ij` over patches
    j, mean over patches i. Tokens before the patches (class token, registers) are left out.

    Args:
        maps: softmax maps `[B, H, N, N]`.
        grid: (rows, columns) of patches, the last rows * columns tokens.
    """
    patches = grid[0] * grid[1]
    maps = maps[..., -patches:, -patches:]
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).view(patches, 2)
    distance = torch.cdist(places.double(), places.double()).to(maps)  # [patches, patches]
    return ((maps * distance).sum(-1) / maps.sum(-1)).mean((0, 2))


def patch_grid(model: nn.Module, tokens: int) -> tuple[int, int] | None:
    """(rows, columns) of patches of a model that knows it, else of the square among `tokens`; None if there is none."""
    model = unwrap(model)
    grid = getattr(model, "grid_size", None) or getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None and math.isqrt(tokens - 1) ** 2 == tokens - 1:
        grid = (math.isqrt(tokens - 1),) * 2
    return None if grid is None or grid[0] * grid[1] > tokens else (int(grid[0]), int(grid[1]))


def effective_rank(maps: Tensor) -> Tensor:
    """How many directions the maps have, from 1 to N: `(sum s^2)^2 / sum s^4` over singular values s. `[H]`.

    The participation ratio of s^2: an effective rank in the sense of Roy & Vetterli (EUSIPCO 2007) with Renyi's entropy
    of order 2 for Shannon's, which needs one product and no decomposition: `|A|^4 / |A^T A|^2`. A map that gives every
    query the same has rank 1 (Dong et al., arXiv:2103.03404).
    """
    maps = maps.float() / maps.float().norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)  # |A| = 1
    return (maps.mT @ maps).square().sum((-2, -1)).reciprocal().mean(0)


def token_similarity(tokens: Tensor) -> float:
    """Mean cosine between different tokens of a picture, `[B, N, D]`: 1 is complete over-smoothing.

    Gong et al., "Vision Transformers with Patch Diversification", arXiv:2104.12753; Wang et al., arXiv:2203.05962.
    """
    N = tokens.shape[1]
    unit = nn.functional.normalize(tokens.float(), dim=-1, eps=1e-30)
    return float((unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))).mean() / (N * (N - 1)))


def thetas(model: nn.Module) -> list[Tensor | None]:
    """The mix of heads after the softmax in every block, `[H, H]` (row = new head), None where a block has none."""
    mixes = (getattr(module, "mix", None) for module in attention_modules(model))
    return [mix.weight.detach().float().cpu() if isinstance(mix, HeadMix) else None for mix in mixes]


def diagonal_share(theta: Tensor) -> float:
    """`sum_h theta_hh^2 / sum theta^2`: 1 leaves the heads apart, 1/H is what a random mix has."""
    return float(theta.diagonal().square().sum() / theta.square().sum())


@torch.no_grad()
def norm_variance(module: nn.Module, softmax: Tensor) -> Tensor | None:
    """Variance of the maps that a BatchNorm over heads sees, over pictures and entries, `[H]`; None without that norm.

    To be read against the norm's eps: where it is smaller, the norm divides by a constant and acts as a temperature.
    Exact over batches that are averaged, because the mean is known beforehand: rows sum to one.

    Args:
        module: an attention module; softmax: its softmax maps `[B, H, N, N]`.
    """
    if not isinstance(getattr(module, "norm", None), BatchNorm):
        return None
    flat = (softmax - 1 / softmax.shape[-1]).transpose(0, 1).flatten(1)  # [H, B N N]
    covariance = flat @ flat.mT / flat.shape[1]  # [H, H]
    if getattr(module, "mix", None) is None:
        return covariance.diagonal()
    return (module.mix.weight @ covariance * module.mix.weight).sum(1)
