"""How alike attention maps are across blocks (the paper's M) and across the heads of a block, and how many blocks count
as similar. Maps are `[B, H, N, N]` per block, rows queries; a sequence of them may compute them as they are read.

M is confounded: a norm over heads lowers it without mixing heads, and softmax maps near uniform are alike whatever was
learned. So look at it beside M of the softmax maps, of `centred` maps, and at initialisation."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deepvit.analysis.measures import measure
from deepvit.analysis.recording import HELD_BYTES
from deepvit.errors import UserError

CKA_ROWS = 1024  # token vectors compared by CKA, evenly taken: bounds its memory to L x 1024 x D


def centred(maps: Tensor) -> Tensor:
    """The maps minus the mean of each row, `[B, H, N, N]`: for softmax maps A - 1/N, what a head attends to beyond
    looking at everything alike; for mixed or normed maps the mean is what that part has become."""
    return maps - maps.mean(-1, keepdim=True)


def unit_columns(maps: Tensor) -> Tensor:
    """Every column of the maps divided by its length. A column of zeros stays zeros, so its similarity is 0."""
    return F.normalize(maps.float(), dim=-2, eps=1e-30)


def column_similarity(p: Tensor, q: Tensor) -> Tensor:
    """The paper's M: the cosine between what token t gives to each output in block p and in block q.

    `M[b, h, t] = <p[b, h, :, t], q[b, h, :, t]> / (|p[b, h, :, t]| |q[b, h, :, t]|)`
    (Zhou et al., arXiv:2103.11886, section 3.2). p, q: `[B, H, N, N]` -> `[B, H, N]`, from -1 to 1."""
    _check_alike(p, q)
    return (unit_columns(p) * unit_columns(q)).sum(-2)


@measure("similarity/softmax", "previous/softmax", "unit/softmax")
@measure("similarity/final", "previous/final", "unit/final")
@measure("similarity/softmax_centred", "previous/softmax_centred", "unit/softmax_centred")
@measure("similarity/final_centred", "previous/final_centred", "unit/final_centred")
def mean_product(p: Tensor, q: Tensor) -> Tensor:
    """Mean over images and columns of the products of unit columns: `[B, H, N, N]` twice -> `[H]`."""
    _check_alike(p, q)
    return (p * q).sum((-2, -1)).mean(0) / p.shape[-1]


def _check_alike(p: Tensor, q: Tensor) -> None:
    if p.shape != q.shape:
        raise UserError(f"Maps of shapes {tuple(p.shape)} and {tuple(q.shape)} cannot be compared: the blocks must "
                        f"have the same number of heads and tokens.")


def adjacent_similarity(maps: Sequence[Tensor], per_head: bool = False) -> Tensor:
    """Mean M of each block and the next, over images, heads and tokens: `[L - 1]`, or `[L - 1, H]` per head."""
    rows = [mean_product(p, q) for p, q in pairwise(map(unit_columns, maps))]
    sims = torch.stack(rows) if rows else maps[0].new_empty(0, maps[0].shape[1])  # [L - 1, H]
    return sims if per_head else sims.mean(-1)


def cross_layer_similarity(maps: Sequence[Tensor], per_head: bool = False, *, minus_uniform: bool = False) -> Tensor:
    """Mean M between all pairs of blocks, over images, heads and tokens: `[L, L]`, symmetric with ones on the diagonal,
    or `[H, L, L]` per head; with `minus_uniform` of the `centred` maps.

    `maps`: `[B, H, N, N]` per block, from `attention_maps` or `record(model, x).maps(stage)`; of the latter at most 256
    MiB are held at a time, and maps are computed again where that is too little."""
    # All pairs of blocks are a small product for each row: one of all rows would sum too many of one sign in float32.
    first, blocks = maps[0], range(len(maps))
    fitting = HELD_BYTES // (4 * first.numel())  # blocks, in float32
    size = len(maps) if len(maps) <= fitting else max(1, fitting // 2)  # of a group; two are held
    groups = [blocks[start:start + size] for start in blocks[::size]]
    sims = torch.empty(first.shape[1], len(maps), len(maps), device=first.device)
    with _exact_products(first.device):
        for at, rows in enumerate(groups):
            mine = _gather_unit_columns(maps, rows, first, minus_uniform)
            for columns in groups[at:]:
                others = mine if columns is rows else _gather_unit_columns(maps, columns, first, minus_uniform)
                products = (mine @ others.mT).sum((1, 2)) / (first.shape[0] * first.shape[-1])  # [H, rows, columns]
                sims[:, rows.start:rows.stop, columns.start:columns.stop] = products
                sims[:, columns.start:columns.stop, rows.start:rows.stop] = products.mT
    return sims if per_head else sims.mean(0)


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """float32 products in float32: no autocast, no TF32."""
    settings = torch.backends.cuda.matmul
    allowed, settings.allow_tf32 = settings.allow_tf32, False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        settings.allow_tf32 = allowed


def _gather_unit_columns(maps: Sequence[Tensor], blocks: range, like: Tensor, minus_uniform: bool) -> Tensor:
    B, H, N, _ = like.shape
    gathered = torch.empty(H, B, N, len(blocks), N, device=like.device)
    for place, block in enumerate(blocks):
        columns = unit_columns(centred(maps[block]) if minus_uniform else maps[block])
        _check_alike(like, columns)
        gathered[:, :, :, place] = columns.transpose(0, 1)
    return gathered


def similar_blocks(maps_or_similarity: Tensor | Sequence[Tensor], threshold: float = 0.9,
                   rule: Literal["adjacent", "earlier"] = "adjacent") -> int:
    """The number of similar blocks, of a similarity matrix `[L, L]`, adjacent similarities `[L - 1]`, or maps of every
    block: those whose mean M with the next block exceeds `threshold`, or by rule "earlier" with any block before. (The
    paper counts them at 90 % but leaves open which pairs and which mean.)"""
    sims = maps_or_similarity
    if not isinstance(sims, Tensor):
        sims = adjacent_similarity(sims) if rule == "adjacent" else cross_layer_similarity(sims)
    if rule == "adjacent":
        return int((sims if sims.ndim == 1 else sims.diagonal(1)).gt(threshold).sum())
    if rule != "earlier" or sims.ndim != 2:
        raise UserError(f"rule='{rule}' counts no similar blocks here: choose adjacent, or earlier with a matrix.")
    return int(sims.tril(-1).gt(threshold).any(1).sum())


def head_similarity(maps: Tensor) -> float | None:
    """Mean column cosine between different heads of a block (section 3.2: below 0.3); None with a single head."""
    return mean_head_product(unit_columns(maps))


@measure("head_similarity/softmax", "unit/softmax")
@measure("head_similarity/final", "unit/final", title="Similarity of heads in a block, final maps", unit="cosine")
@measure("head_similarity/softmax_centred", "unit/softmax_centred")
@measure("head_similarity/final_centred", "unit/final_centred")
def mean_head_product(unit: Tensor) -> float | None:
    """Mean product of unit columns `[B, H, N, N]` of different heads; None with a single head."""
    heads = unit.shape[1]
    if heads == 1:
        return None
    total = unit.sum(1).square().sum(-2)  # [B, N], |sum of the heads|^2 = each head's own square + all products
    own = unit.square().sum((1, 2))  # [B, N]
    return float((total - own).mean() / (heads * (heads - 1)))


class SampledRows:
    """Evenly taken token vectors of every block, gathered over batches: at most about `rows` of `images * N`."""

    def __init__(self, images: int, rows: int = CKA_ROWS):
        self.images, self.rows, self.seen, self.parts = images, rows, 0, []

    def add(self, tokens: Sequence[Tensor]) -> None:
        B, N, _ = tokens[0].shape
        stride = max(1, math.ceil(self.images * N / self.rows))
        while math.gcd(stride, N) > 1:  # else the same places of every image
            stride += 1
        first = -self.seen * N % stride
        self.parts.append([block.flatten(0, 1)[first::stride].float() for block in tokens])
        self.seen += B

    def blocks(self) -> list[Tensor]:
        """One `[rows, D]` tensor per block."""
        return [torch.cat(parts) for parts in zip(*self.parts)]
