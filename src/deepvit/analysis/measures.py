"""What a block does, as numbers: its tokens and branches, its maps, the norm and the head mix behind them; and rollout,
what attention does over all blocks. A new measure is a new function here or in another module that the package imports:
the probe, the runs' logs, the figures and the docs read them from `MEASURES`.

Maps are `[B, H, N, N]`, rows queries. A measure of maps gives one number per head, `[H]`, the mean over images."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # plain and synchronised

from deepvit.analysis.recording import attention_modules, rms
from deepvit.errors import UserError
from deepvit.models.attention import HeadMix


@dataclass(frozen=True)
class Measure:
    """One number for each block. `name` is its key in probes and logs; a slash nests it. `takes` names what the
    function is given, in its order:

    - of an attention: `module`, `logits`, `softmax`, `final` (maps `[B, H, N, N]`), `grid` (rows and columns of
      patches), `cls_token`; the maps as unit columns, `unit/<kind>`, and those of the previous attention,
      `previous/<kind>`, see `probe.KINDS`;
    - of a block: `first`, `before`, `after` (tokens `[B, N, D]` that enter the first block, this one, and leave it),
      `attention`, `mlp` (RMS `[B]` of the branches as they are added);
    - of both, once for all images: `norm`, `theta`; `rows_first`, `rows_before`, `rows_after` (samples `[n, D]`).

    It returns a number, a tensor whose mean is the number (with `root`: the root of the mean over all images), or None
    where a block has none. A `title` gives it a panel in figures; `span`: the least span of the panel's axis, in its
    `unit`, for "ratio" a factor."""

    name: str
    takes: tuple[str, ...]
    function: Callable[..., Tensor | float | None]
    title: str | None = None
    unit: str = ""
    span: float = 0.2
    root: bool = False

    def __call__(self, block: Mapping[str, Any]) -> float | None:
        """None where anything that it takes is None."""
        arguments = [block[name] for name in self.takes]
        value = None if any(argument is None for argument in arguments) else self.function(*arguments)
        return value if value is None else float(torch.as_tensor(value).mean())

    def found_in(self, probe: Mapping[str, Any]) -> list[float | None]:
        """Its numbers in a probe, block by block; empty if that probe has none, as of an earlier version."""
        group, _, own = self.name.partition("/")
        found = probe.get(group, {})
        return found.get(own, []) if own and isinstance(found, Mapping) else found or []


MEASURES: dict[str, Measure] = {}  # name -> measure, in the order of probes and panels


def measure(name: str, *takes: str, **drawn: Any) -> Callable:
    """Registers a function as a measure and returns it. `drawn`: `title`, `unit`, `span`, `root`, see `Measure`."""
    def register(function: Callable) -> Callable:
        MEASURES[name] = Measure(name, takes, function, **drawn)
        return function

    return register


@measure("feature_cosine_first", "first", "after")
@measure("feature_cosine_adjacent", "before", "after")
def feature_cosine(p: Tensor, q: Tensor) -> float:
    """Mean cosine between a token in one block and the same token in another, `[B, N, D]` twice."""
    return float(F.cosine_similarity(p.float(), q.float(), dim=-1, eps=1e-30).mean())


@measure("cka_first", "rows_first", "rows_after", title="Tokens against the first block's input", unit="linear CKA")
@measure("cka_adjacent", "rows_before", "rows_after")
def linear_cka(p: Tensor, q: Tensor) -> float:
    """Linear centred kernel alignment of features `[n, D]` and `[n, E]`, from 0 to 1 (same up to rotation and scale).

    `|P^T Q|^2 / (|P^T P| |Q^T Q|)` in Frobenius norms, columns centred (Kornblith et al., arXiv:1905.00414, eq. 4).
    Biased upwards where n is not far above D."""
    p, q = (x.double() - x.double().mean(0) for x in (p, q))
    cross, own = (p.mT @ q).square().sum(), (p.mT @ p).norm() * (q.mT @ q).norm()
    return float(cross / own) if own > 0 else 0.0


@measure("entropy", "softmax", title="Entropy of the softmax maps", unit="nats")
def attention_entropy(maps: Tensor) -> Tensor:
    """Mean entropy of the rows, `-sum_j a_ij ln a_ij`, in nats: 0 for one token, ln N for all alike. `[H]`.

    For maps whose rows are distributions, so `stage="softmax"`; raises UserError where entries are negative."""
    if (maps < 0).any():
        raise UserError("The entropy of maps with negative entries is not defined: take them at stage='softmax'.")
    return torch.special.entr(maps).sum(-1).mean((0, 2))


@measure("distance", "softmax", "grid", title="Attention distance", unit="patches", span=0.5)
def attention_distance(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean distance between a patch and the patches it attends to, weighted by attention, in patches. `[H]`.

    Dosovitskiy et al., arXiv:2010.11929, figure 7 (there in pixels): `sum_j a_ij |r_i - r_j| / sum_j a_ij` over patches
    j, mean over patches i, of softmax maps. `grid`: (rows, columns) of patches, which are the last tokens."""
    patches = grid[0] * grid[1]
    maps = maps[..., -patches:, -patches:]
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).view(patches, 2)
    distance = torch.cdist(places.double(), places.double()).to(maps)  # [patches, patches]
    return ((maps * distance).sum(-1) / maps.sum(-1)).mean((0, 2))


def patch_grid(model: nn.Module, tokens: int) -> tuple[int, int] | None:
    """(rows, columns) of patches of a model that knows it, else of the square among `tokens`; None if there is none, as
    for images of another size than the model's (timm's dynamic_img_size)."""
    model = unwrap_model(model)
    grid = getattr(model, "grid_size", None) or getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None and math.isqrt(tokens - 1) ** 2 == tokens - 1:
        grid = (math.isqrt(tokens - 1),) * 2
    others = tokens - grid[0] * grid[1] if grid else -1
    return (int(grid[0]), int(grid[1])) if others == getattr(model, "num_prefix_tokens", max(0, others)) else None


@measure("rank/softmax", "softmax")
@measure("rank/final", "final", title="Effective rank of the final maps", unit="directions", span=1.0)
def effective_rank(maps: Tensor) -> Tensor:
    """How many directions the maps have, from 1 to N: `(sum s^2)^2 / sum s^4` over singular values s. `[H]`.

    Roy & Vetterli's effective rank (EUSIPCO 2007) of s^2, with Renyi's entropy of order 2 for Shannon's, which needs no
    decomposition: `|A|^4 / |A^T A|^2`. A map whose rows are all equal has 1 (Dong et al., arXiv:2103.03404)."""
    maps = maps.float() / maps.float().norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)  # |A| = 1
    return (maps.mT @ maps).square().sum((-2, -1)).reciprocal().mean(0)


@measure("token_similarity", "after", title="Similarity of tokens in an image", unit="cosine")
def token_similarity(tokens: Tensor) -> float:
    """Mean cosine between different tokens of an image, `[B, N, D]`: 1 is complete over-smoothing.

    Gong et al., "Vision Transformers with Patch Diversification", arXiv:2104.12753; Wang et al., arXiv:2203.05962."""
    N = tokens.shape[1]
    unit = F.normalize(tokens.float(), dim=-1, eps=1e-30)
    return float((unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))).mean() / (N * (N - 1)))


def thetas(model: nn.Module) -> list[Tensor | None]:
    """The mix of heads after the softmax in every block, `[H, H]` (row = new head), None where a block has none."""
    return [mix and mix.weight.detach().float().cpu() for mix in head_mixes(model)]


def head_mixes(model: nn.Module) -> list[HeadMix | None]:
    """The mix of heads of each attention; None for one without."""
    found = (getattr(module, "mix", None) for module in attention_modules(model))
    return [mix if isinstance(mix, HeadMix) else None for mix in found]


@measure("theta_diagonal_share", "theta", title="Share of Theta's diagonal", unit="1: heads apart, 1/H: random")
def diagonal_share(theta: Tensor) -> float:
    """`sum_h theta_hh^2 / sum theta^2`: 1 leaves the heads apart, 1/H is what a random mix has."""
    return float(theta.diagonal().square().sum() / theta.square().sum())


@measure("norm_variance", "module", "softmax")
@torch.no_grad()
def norm_variance(module: nn.Module, softmax: Tensor) -> Tensor | None:
    """Variance of the maps that a BatchNorm over heads sees, over images and entries, `[H]`; None without that norm.

    `softmax`: the module's softmax maps `[B, H, N, N]`. Where the variance is below the norm's eps, the norm divides by
    a constant and acts as a temperature. Averaged over batches it is exact: as rows sum to one, the mean is known."""
    if not isinstance(getattr(module, "norm", None), BatchNorm):
        return None
    flat = (softmax - 1 / softmax.shape[-1]).transpose(0, 1).flatten(1)  # [H, B N N]
    covariance = flat @ flat.mT / flat.shape[1]  # [H, H]
    if getattr(module, "mix", None) is None:
        return covariance.diagonal()
    theta = module.mix.weight.to(covariance)
    return (theta @ covariance * theta).sum(1)


@measure("norm_dose", "module", "softmax", title="Variance before the norm over heads / eps", unit="ratio", span=10)
def norm_dose(module: nn.Module, softmax: Tensor) -> Tensor | None:
    """`norm_variance` over the norm's eps, `[H]`: below 1 the norm is near the constant gain 1 / sqrt(eps)."""
    variance = norm_variance(module, softmax)
    return None if variance is None else variance / module.norm.eps


@measure("norm_running_variance", "norm")
def norm_running_variance(norm: BatchNorm) -> Tensor:
    """The variance that the norm over heads divides by in eval mode, `[H]`."""
    return norm.running_var


@measure("norm_eps", "norm")
def norm_eps(norm: BatchNorm) -> float:
    """The eps that is added to that variance."""
    return norm.eps


@measure("largest_logit", "logits", title="Largest logit of an image", unit="logit", span=1.0)
def largest_logit(logits: Tensor) -> Tensor:
    """The largest entry of q k^T as the softmax sees it, over heads, queries and keys of an image, `[B]`.

    Where it grows, attention becomes one-hot and training unstable (arXiv:2302.05442, section 2; arXiv:2309.14322)."""
    return logits.amax((1, 2, 3))


@measure("sink_mass/largest", "softmax", title="Largest share of a head's attention on one token", unit="share")
def sink_mass(softmax: Tensor) -> Tensor:
    """`max_j sum_i a_ij / N`, mean over images, `[H]`: from 1/N (uniform) to 1 (all on one token, an attention sink).

    Xiao et al., arXiv:2309.17453; in ViTs: Darcet et al., arXiv:2309.16588."""
    return softmax.mean(-2).amax(-1).mean(0)


@measure("sink_mass/class_token", "softmax", "cls_token")
def class_token_mass(softmax: Tensor, cls_token: Tensor) -> Tensor:
    """`sum_i a_i0 / N`: the share of a head's attention that falls on the class token, mean over images, `[H]`."""
    return softmax[..., 0].mean((0, 2))


@measure("rank_residual", "after", title="Residual of the tokens to rank one", unit="share")
def rank_residual(tokens: Tensor) -> Tensor:
    """`|X - 1 x^T| / |X|` of an image's tokens X `[N, D]`, x their mean, `[B]`: 0 where all tokens are the same.

    Dong et al., arXiv:2103.03404, whose norm is sqrt(|X|_1 |X|_inf); for Frobenius' norm, as here, the mean is the
    nearest matrix of equal rows, so it stays between 0 and 1."""
    tokens = tokens.float()
    return (tokens - tokens.mean(1, keepdim=True)).norm(dim=(1, 2)) / tokens.norm(dim=(1, 2)).clamp_min(1e-30)


@measure("branch_over_stream/mlp", "mlp", "before", title="MLP branch over stream", unit="ratio", span=10)
@measure("branch_over_stream/attention", "attention", "before", title="Attention branch over stream", unit="ratio",
         span=10)
def branch_over_stream(branch: Tensor, stream: Tensor) -> Tensor:
    """RMS `[B]` of a branch as it is added, over that of the tokens `[B, N, D]` that enter its block."""
    return branch / rms(stream).clamp_min(1e-30)


@measure("spread", "softmax", root=True)
def squared_spread(softmax: Tensor) -> Tensor:
    """`N std(A)` of the softmax maps, by the mean variance in a head: 0 where all are uniform. Gives the square."""
    return softmax.shape[-1]**2 * _variance(softmax)


@measure("gain", "softmax", "final", root=True)
def squared_gain(softmax: Tensor, final: Tensor) -> Tensor:
    """Standard deviation of the final maps over that of the softmax maps. Gives the square."""
    return _variance(final) / _variance(softmax)


def _variance(maps: Tensor) -> Tensor:
    return maps.var((2, 3), correction=0).mean(1)  # [B]


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """How much of each input token the last block's tokens hold, if attention were all that moves them: `[B, N, N]`,
    rows sum to one, of `[B, H, N, N]` per block, read once and in order.

    Abnar & Zuidema, arXiv:2005.00928: `R_n = A'_n R_{n-1}`, `A'` the mean over heads plus identity, rows sum to 1. Of
    final maps, which may be negative, absolute values are taken and each head's rows normalised first."""
    result = None
    for block in maps:
        heads = F.normalize(block.float(), p=1, dim=-1, eps=1e-30).abs()
        step = (heads.mean(1) + torch.eye(block.shape[-1], device=block.device)) / 2  # [B, N, N], rows sum to 1
        step = step / step.sum(-1, keepdim=True)  # a row of zeros has only itself
        result = step if result is None else step @ result
    return result


def class_token_mask(rolled: Tensor, grid: tuple[int, int]) -> Tensor:
    """What the class token holds of each patch, from 0 to 1 (the largest): `[B, N, N]` -> `[B, rows, columns]`."""
    mask = rolled[:, 0, -grid[0] * grid[1]:]
    return (mask / mask.amax(-1, keepdim=True)).unflatten(-1, grid)
