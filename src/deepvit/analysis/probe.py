"""All measures of a model on one batch of images, as plain numbers to log while it trains."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from deepvit.analysis import features, measures, similarity  # noqa: F401  they register the measures
from deepvit.analysis.features import SampledRows
from deepvit.analysis.measures import BatchNorm, patch_grid, thetas
from deepvit.analysis.recording import BRANCHES, Recording, attention_modules, recordings, unwrap
from deepvit.analysis.registry import MEASURES
from deepvit.analysis.similarity import (
    KINDS,
    Transformed,
    by_kind,
    centred,
    cross_layer_similarity,
    held,
    images_for_pairs,
    similar_blocks,
    unit_columns,
)

Block = Mapping[str, Any]  # what measures take: see `registry.Measure`


def probe(model: nn.Module, x: Tensor, *, batch_size: int | None = None, threshold: float = 0.9,
          matrix: bool = False) -> dict[str, Any]:
    """What attention does in every block of `model` on images `[B, C, height, width]`, as plain JSON values.

    The model is left as it was (training flags, statistics, random state). Two blocks' maps are held at a time; for
    `matrix` those of all blocks, of as many images as keep them within 256 MiB (but one at least), three times over.

    Args:
        batch_size: images at a time; by default what keeps one block's maps within 32 MiB (with `matrix`: see above).
        threshold: mean M of a pair of adjacent blocks above which it counts as similar.
        matrix: give the all-pairs similarities too.
    Returns:
        `images`, `tokens`, `heads`, `blocks`, and every measure of `registry.MEASURES`: a list with one entry per
        block (None where a block has no such thing), or per adjacent pair where it compares blocks. A slash in a name
        nests it. `similarity` has the kinds softmax, final, softmax_centred and final_centred (minus the uniform part,
        1/N), each with `adjacent` (per pair), `mean`, `similar_blocks`, and `matrix` if asked for.
    Raises:
        UserError: no attention, no images.
    """
    sums: dict[str, list[float | None]] = {}
    matrices: dict[str, Tensor] = {}
    sample = SampledRows(len(x))
    for recording in recordings(model, x, batch_size or (images_for_pairs(model, x) if matrix else None)):
        weight = len(recording) / len(x)
        maps = {stage: recording.maps(stage) for stage in ("logits", "softmax", "final")}
        if matrix:
            maps |= {stage: held(maps[stage]) for stage in ("softmax", "final")}
            for kind, pairs in _of_pairs(maps["softmax"], maps["final"]).items():
                matrices[kind] = matrices.get(kind, 0) + weight * pairs
        _add(sums, _measured(chain(_attentions(model, recording, maps), _blocks(recording))), weight)
        sample.add(recording.tokens) if recording.tokens else None
    _add(sums, _measured(chain(_parameters(model), _rows(sample.blocks()))), 1.0)
    tokens, heads = maps["final"][0].shape[-1], maps["final"][0].shape[1]
    result = {"images": len(x), "tokens": tokens, "heads": heads, "blocks": len(recording.modules)}
    result |= _nested(sums, threshold)
    for kind, pairs in matrices.items():
        result["similarity"][kind]["matrix"] = pairs.tolist()
    return result


def _of_pairs(softmax: Sequence[Tensor], final: Sequence[Tensor]) -> dict[str, Tensor]:
    """`[L, L]` of all pairs of blocks for each kind of similarity."""
    kinds = (softmax, final, Transformed(softmax, centred), Transformed(final, centred))
    return {kind: cross_layer_similarity(blocks) for kind, blocks in zip(KINDS, kinds, strict=True)}


def _attentions(model: nn.Module, recording: Recording, maps: Mapping[str, Sequence[Tensor]]) -> Iterator[Block]:
    """What measures take of each attention."""
    cls_token, previous = getattr(unwrap(model), "cls_token", None), {}
    for module, *stages in zip(recording.modules, *maps.values(), strict=True):
        block = dict(zip(maps, stages))
        units = {kind: unit_columns(chosen) for kind, chosen in by_kind(block["softmax"], block["final"]).items()}
        yield {**block, "module": module, "grid": patch_grid(model, stages[0].shape[-1]), "cls_token": cls_token,
               **{f"unit/{kind}": unit for kind, unit in units.items()}, **previous}
        previous = {f"previous/{kind}": unit for kind, unit in units.items()}


def _blocks(recording: Recording) -> Iterator[Block]:
    """What measures take of each block's tokens and branches."""
    branches = {branch: rows for branch, rows in recording.branches.items() if rows}
    for i, (before, after) in enumerate(zip(recording.tokens, recording.tokens[1:])):
        yield {"first": recording.tokens[0], "before": before, "after": after,
               **{branch: branches[branch][i] for branch in BRANCHES if branch in branches}}


def _rows(rows: Sequence[Tensor]) -> Iterator[Block]:
    for before, after in zip(rows, rows[1:]):
        yield {"rows_first": rows[0], "rows_before": before, "rows_after": after}


def _parameters(model: nn.Module) -> Iterator[Block]:
    for module, theta in zip(attention_modules(model), thetas(model), strict=True):
        norm = getattr(module, "norm", None)
        yield {"theta": theta, "norm": norm if isinstance(norm, BatchNorm) else None}


def _measured(blocks: Iterable[Block]) -> dict[str, list[float | None]]:
    """Every measure of these blocks, each of those that have what it takes."""
    values: dict[str, list[float | None]] = {name: [] for name in MEASURES}
    for block in blocks:
        for name, measure in MEASURES.items():
            if block.keys() >= {*measure.takes}:
                values[name].append(measure(block))
        del block  # its maps, before those of the next are computed
    return values


def _add(sums: dict[str, list[float | None]], values: Mapping[str, list[float | None]], weight: float) -> None:
    for name, found in values.items():
        if found or name not in sums:
            total = sums.get(name) or [0.0] * len(found)
            sums[name] = [None if None in pair else pair[0] + pair[1] * weight for pair in zip(total, found)]


def _nested(sums: Mapping[str, list[float | None]], threshold: float) -> dict[str, Any]:
    """`similarity/final` -> `{"similarity": {"final": ...}}`; similarities with their mean and count."""
    result: dict[str, Any] = defaultdict(dict)
    for name, values in sums.items():
        group, _, kind = name.partition("/")
        if group == "similarity":
            values = {"adjacent": values, "mean": sum(values) / len(values) if values else None,
                      "similar_blocks": similar_blocks(torch.tensor(values), threshold)}
        if kind:
            result[group][kind] = values
        else:
            result[group] = values
    return dict(result)
