"""How alike the tokens of different blocks are: cosine and linear CKA. Tokens are `[B, N, D]` per block."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepvit.analysis.recording import recordings
from deepvit.analysis.registry import measure
from deepvit.errors import UserError

CKA_ROWS = 1024  # token vectors compared by CKA, evenly taken: bounds its memory to L x 1024 x D


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
    Biased upwards where n is not far above D.
    """
    p, q = (x.double() - x.double().mean(0) for x in (p, q))
    cross, own = (p.mT @ q).square().sum(), (p.mT @ p).norm() * (q.mT @ q).norm()
    return float(cross / own) if own > 0 else 0.0


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


def cka_matrix(model: nn.Module, x: Tensor, batch_size: int | None = None) -> Tensor:
    """Linear CKA between the tokens after all pairs of blocks, on images `[B, C, height, width]`.

    Returns:
        `[L + 1, L + 1]`; index 0 is the input of the first block. Uses at most about 1024 tokens, evenly taken.
    Raises:
        UserError: the model has no `blocks`.
    """
    sample = SampledRows(len(x))
    for recording in recordings(model, x, batch_size):
        if not recording.tokens:
            raise UserError(f"{type(model).__name__} has no `blocks` whose tokens could be compared.")
        sample.add(recording.tokens)
    blocks = sample.blocks()
    result = torch.eye(len(blocks), dtype=torch.float64)
    for i, p in enumerate(blocks):
        for j, q in enumerate(blocks[:i]):
            result[i, j] = result[j, i] = linear_cka(p, q)
    return result
