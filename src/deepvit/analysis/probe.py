"""All measures of a model on one batch of pictures, as plain numbers to log while it trains."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepvit.analysis.features import SampledRows, feature_cosine, linear_cka
from deepvit.analysis.measures import (
    BatchNorm,
    attention_distance,
    attention_entropy,
    diagonal_share,
    effective_rank,
    norm_variance,
    patch_grid,
    thetas,
    token_similarity,
)
from deepvit.analysis.recording import attention_modules, recordings
from deepvit.analysis.similarity import (
    Transformed,
    centred,
    cross_layer_similarity,
    held,
    images_for_pairs,
    mean_head_product,
    mean_product,
    similar_blocks,
    unit_columns,
)

KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of (softmax, final) maps
    "softmax": lambda softmax, final: softmax,
    "final": lambda softmax, final: final,
    "softmax_centred": lambda softmax, final: centred(softmax),
    "final_centred": lambda softmax, final: centred(final),
}


def probe(model: nn.Module, x: Tensor, *, batch_size: int | None = None, threshold: float = 0.9,
          matrix: bool = False) -> dict[str, Any]:
    """What attention does in every block of `model` on pictures `[B, C, height, width]`, as plain JSON values.

    The model is left as it was (training flags, statistics, random state). Two blocks' maps are held at a time; for
    `matrix` those of all blocks, of as many pictures as keep them within 256 MiB (but one at least), three times over.

    Args:
        batch_size: pictures at a time; by default what keeps one block's maps within 32 MiB (with `matrix`: see above).
        threshold: mean M of a pair of adjacent blocks above which it counts as similar.
        matrix: give the all-pairs similarities too.
    Returns:
        lists have one entry per block (None where a block has no such thing), or per adjacent pair where it says so:
        `images`, `tokens`, `heads`, `blocks`;
        `similarity`: for each of softmax, final, softmax_centred, final_centred (minus the uniform part, 1/N):
            `adjacent` (per pair), `mean`, `similar_blocks`, and `matrix` if asked for;
        `head_similarity`: for the same four, the mean cosine between heads of a block;
        `entropy` (nats) and `distance` (patches) of the softmax maps; `rank`: effective rank for softmax and final;
        `token_similarity`, `feature_cosine_first`, `feature_cosine_adjacent`, `cka_first`, `cka_adjacent`: of the
            block's output, against the first block's input, or against the block's own input;
        `norm_variance` of the maps before the norm over heads (mean over heads), `norm_running_variance`, `norm_eps`;
        `theta_diagonal_share`.
    Raises:
        UserError: no attention, no pictures.
    """
    sums: dict[str, list[float | None]] = {}
    matrices: dict[str, Tensor] = {}
    sample = SampledRows(len(x))
    for recording in recordings(model, x, batch_size or (images_for_pairs(model, x) if matrix else None)):
        weight = len(recording) / len(x)
        maps = {stage: recording.maps(stage) for stage in ("softmax", "final")}
        if matrix:
            maps = {stage: held(blocks) for stage, blocks in maps.items()}
            for kind, pairs in _of_pairs(maps).items():
                matrices[kind] = matrices.get(kind, 0) + weight * pairs
        for name, values in {**_of_maps(model, recording.modules, maps), **_of_tokens(recording.tokens)}.items():
            sums[name] = _add(sums.get(name), values, weight)
        sample.add(recording.tokens) if recording.tokens else None
    tokens, heads = maps["final"][0].shape[-1], maps["final"][0].shape[1]
    result = {"images": len(x), "tokens": tokens, "heads": heads, "blocks": len(recording.modules)}
    result |= _nested(sums, threshold) | _cka(sample.blocks()) | _parameters(model)
    for kind, pairs in matrices.items():
        result["similarity"][kind]["matrix"] = pairs.tolist()
    return result


def _of_pairs(maps: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """`[L, L]` of all pairs of blocks for each kind of similarity."""
    transformed = {f"{stage}_centred": Transformed(blocks, centred) for stage, blocks in maps.items()}
    return {kind: cross_layer_similarity(blocks) for kind, blocks in {**maps, **transformed}.items()}


def _of_maps(model: nn.Module, modules: Sequence[nn.Module],
             maps: Mapping[str, Sequence[Tensor]]) -> dict[str, list[float | None]]:
    """Per block (adjacent similarities: per pair): means over the recorded pictures."""
    values, last = defaultdict(list), {}
    for module, softmax, final in zip(modules, maps["softmax"], maps["final"], strict=True):
        for kind, choose in KINDS.items():
            unit = unit_columns(choose(softmax, final))
            pairs = values[f"similarity/{kind}"]
            if kind in last:
                pairs.append(float(mean_product(last[kind], unit).mean()))
            last[kind] = unit
            values[f"head_similarity/{kind}"].append(mean_head_product(unit) if unit.shape[1] > 1 else None)
        values["rank/softmax"].append(float(effective_rank(softmax).mean()))
        values["rank/final"].append(float(effective_rank(final).mean()))
        values["entropy"].append(float(attention_entropy(softmax).mean()))
        grid = patch_grid(model, softmax.shape[-1])
        values["distance"].append(None if grid is None else float(attention_distance(softmax, grid).mean()))
        variance = norm_variance(module, softmax)
        values["norm_variance"].append(None if variance is None else float(variance.mean()))
    return values


def _of_tokens(tokens: list[Tensor]) -> dict[str, list[float | None]]:
    return {
        "token_similarity": [token_similarity(after) for after in tokens[1:]],
        "feature_cosine_first": [feature_cosine(tokens[0], after) for after in tokens[1:]],
        "feature_cosine_adjacent": [feature_cosine(before, after) for before, after in zip(tokens, tokens[1:])],
    }


def _cka(rows: list[Tensor]) -> dict[str, list[float]]:
    return {"cka_first": [linear_cka(rows[0], after) for after in rows[1:]],
            "cka_adjacent": [linear_cka(before, after) for before, after in zip(rows, rows[1:])]}


def _parameters(model: nn.Module) -> dict[str, list[float | None]]:
    norms = [getattr(module, "norm", None) for module in attention_modules(model)]
    norms = [norm if isinstance(norm, BatchNorm) else None for norm in norms]
    return {
        "norm_running_variance": [None if norm is None else float(norm.running_var.mean()) for norm in norms],
        "norm_eps": [None if norm is None else norm.eps for norm in norms],
        "theta_diagonal_share": [None if theta is None else diagonal_share(theta) for theta in thetas(model)],
    }


def _add(total: list[float | None] | None, values: Iterable[float | None], weight: float) -> list[float | None]:
    values = [None if value is None else value * weight for value in values]
    return values if total is None else [None if a is None else a + b for a, b in zip(total, values)]


def _nested(sums: dict[str, list[float | None]], threshold: float) -> dict[str, Any]:
    """`similarity/final` -> `{"similarity": {"final": ...}}`; similarities with their mean and count."""
    result: dict[str, Any] = {}
    for name, values in sums.items():
        group, _, kind = name.partition("/")
        if group == "similarity":
            values = {"adjacent": values, "mean": sum(values) / len(values) if values else None,
                      "similar_blocks": similar_blocks(torch.tensor(values), threshold)}
        if kind:
            result.setdefault(group, {})[kind] = values
        else:
            result[group] = values
    return result
