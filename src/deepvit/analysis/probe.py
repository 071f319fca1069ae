"""All measures of a model on one batch of images, as plain numbers; how loud each block and its gradients are; and the
model as it was before training, which shows what similarity is there by construction."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain, pairwise
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from deepvit.analysis.measures import MEASURES, BatchNorm, patch_grid, thetas
from deepvit.analysis.recording import BRANCHES, HELD_BYTES, Recording, attention_modules, recordings, rms
from deepvit.analysis.similarity import SampledRows, centred, cross_layer_similarity, similar_blocks, unit_columns
from deepvit.engine.evaluate import modes_kept, statistics_of_the_batch
from deepvit.errors import UserError
from deepvit.models.registry import build_model

Block = Mapping[str, Any]  # what measures take: see `measures.Measure`
KINDS = ("softmax", "final", "softmax_centred", "final_centred")  # of maps; centred: minus the uniform part


def probe(model: nn.Module, x: Tensor, *, batch_size: int | None = None, threshold: float = 0.9,
          matrix: bool = False) -> dict[str, Any]:
    """What attention does in every block of `model` on images `[B, C, height, width]`, as plain JSON values.

    Gives `images`, `tokens`, `heads`, `blocks`, and every measure of `measures.MEASURES`: a list with one entry per
    block (None where a block has no such thing), or per adjacent pair where it compares blocks. A slash in a name nests
    it. `similarity` has the kinds softmax, final, softmax_centred and final_centred (minus the uniform part, 1/N), each
    with `adjacent` (per pair), `mean`, `similar_blocks` (pairs whose mean M is above `threshold`) and, with `matrix`,
    the all-pairs `matrix`.

    The model and random state are left as they were. `batch_size`: images at a time, by default what keeps one block's
    maps within 32 MiB; two blocks' maps are held at a time. With `matrix` the maps of all blocks are, within 256 MiB or
    of one image, three times over. Raises UserError if there is no attention, or no image."""
    sums: dict[str, list[float | None]] = {}
    matrices: dict[str, Tensor] = {}
    sample = SampledRows(len(x))
    for recording in recordings(model, x, batch_size, all_blocks=matrix):
        weight = len(recording) / len(x)
        maps = {stage: recording.maps(stage) for stage in ("logits", "softmax", "final")}
        if matrix:
            if 4 * maps["final"][0].numel() * len(maps["final"]) <= HELD_BYTES:  # else computed at each use
                maps |= {stage: [*maps[stage]] for stage in ("softmax", "final")}
            for kind in KINDS:
                stage, _, is_centred = kind.partition("_")
                pairs = cross_layer_similarity(maps[stage], minus_uniform=bool(is_centred))  # [L, L]
                matrices[kind] = matrices.get(kind, 0) + weight * pairs
        _add(sums, _measured(chain(_attentions(model, recording, maps), _blocks(recording))), weight)
        if recording.tokens:
            sample.add(recording.tokens)
    _add(sums, _measured(_once(model, sample.blocks())), 1.0)
    _, heads, tokens, _ = maps["final"][0].shape
    result = {"images": len(x), "tokens": tokens, "heads": heads, "blocks": len(recording.modules)}
    result |= _nested(sums, threshold)
    for kind, pairs in matrices.items():
        result["similarity"][kind]["matrix"] = pairs.tolist()
    return result


def _attentions(model: nn.Module, recording: Recording, maps: Mapping[str, Sequence[Tensor]]) -> Iterator[Block]:
    """What measures take of each attention."""
    cls_token, previous = getattr(unwrap_model(model), "cls_token", None), {}
    for module, *stages in zip(recording.modules, *maps.values(), strict=True):
        block = dict(zip(maps, stages))
        softmax, final = block["softmax"], block["final"]
        units = dict(zip(KINDS, map(unit_columns, (softmax, final, centred(softmax), centred(final))), strict=True))
        yield {**block, "module": module, "grid": patch_grid(model, final.shape[-1]), "cls_token": cls_token,
               **{f"unit/{kind}": unit for kind, unit in units.items()}, **previous}
        previous = {f"previous/{kind}": unit for kind, unit in units.items()}


def _blocks(recording: Recording) -> Iterator[Block]:
    """What measures take of each block's tokens and branches."""
    for (before, after), branches in zip(pairwise(recording.tokens), recording.branches, strict=True):
        yield {"first": recording.tokens[0], "before": before, "after": after, **branches}


def _once(model: nn.Module, rows: Sequence[Tensor]) -> Iterator[Block]:
    """What measures take of all images together."""
    for module, theta in zip(attention_modules(model), thetas(model), strict=True):
        norm = getattr(module, "norm", None)
        yield {"theta": theta, "norm": norm if isinstance(norm, BatchNorm) else None}
    for before, after in pairwise(rows):
        yield {"rows_first": rows[0], "rows_before": before, "rows_after": after}


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
        if MEASURES[name].root:
            values = [None if value is None else value**0.5 for value in values]
        if group == "similarity":
            values = {"adjacent": values, "mean": sum(values) / len(values) if values else None,
                      "similar_blocks": similar_blocks(torch.tensor(values), threshold)}
        if kind:
            result[group][kind] = values
        else:
            result[group] = values
    return dict(result)


def without_matrices(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `probe(..., matrix=True)` gives, without its matrices."""
    return {**values, "similarity": {kind: {name: value for name, value in found.items() if name != "matrix"}
                                     for kind, found in values["similarity"].items()}}


def at_initialisation(model: nn.Module, seed: int = 0, images: Tensor | None = None) -> nn.Module:
    """A freshly initialised deepvit model of the same settings (`model.config`), in eval mode; random state is left
    alone. Raises UserError if the model has no `config`.

    With `images` `[B, C, height, width]` the norms' running statistics are theirs, as in the first training step, and M
    is near 0. Without, they are 0 and 1, which centres no maps: each head is near a constant, M near +1 or -1."""
    model = unwrap_model(model)
    if getattr(model, "config", None) is None:
        raise UserError(f"{type(model).__name__} does not say how it was built: only deepvit models can be looked at "
                        f"at initialisation.")
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        fresh = build_model(model.config).to(device).eval()
    return fresh if images is None else with_statistics_of(fresh, images)


@torch.no_grad()
def with_statistics_of(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy of `model` in eval mode whose norms have the statistics of `images`, as in the first training step."""
    model = deepcopy(unwrap_model(model))
    with statistics_of_the_batch(model):
        model(images)
    return model.eval()


def regime(model: nn.Module, images: Tensor) -> dict[str, list[float]]:
    """Where an untrained model stands: how far its maps are from uniform, and how loud its branches are.

    `model`: anything with `blocks` of one attention each, as `models.blocks.Block`; its norms take their statistics
    from the images `[B, C, height, width]`. Gives lists with an entry per block: `spread` (N std(A)), `gain` (of the
    final maps over the softmax maps), `attention` and `mlp` (RMS of the branch over that of the stream)."""
    found = probe(with_statistics_of(model, images), images)
    branches = found["branch_over_stream"]
    return {"spread": found["spread"], "gain": found["gain"], **{name: branches[name] for name in BRANCHES}}


def block_norms(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None, *,
                training: bool = True) -> dict[str, list[float | None]]:
    """Residual and gradient norms of every block of a model with `blocks`, on images `[B, C, height, width]`.

    Lists with one entry per block, root mean squares over all entries: `stream` (the block's input), `update` (output
    minus input), `attention` and `mlp` (the branches as they are added; None if the block has no `drop_path1`,
    `drop_path2`), `update_ratio` (update / stream). With `loss`, from the model's output to a scalar, such as `lambda
    logits: F.cross_entropy(logits, y)`, also Euclidean norms: `gradient_stream` (d loss / d block input) and
    `gradient_weights` (of all the block's parameters).

    `training`: as the model trains (batch statistics, dropout), which the gradients of an untrained norm need; else in
    eval mode. Buffers, flags, gradients and random state are left alone. Raises UserError if there are no `blocks`."""
    model = unwrap_model(model)
    if not getattr(model, "blocks", None):
        raise UserError(f"{type(model).__name__} has no `blocks` to measure.")
    recording = Recording()
    with _as_before(model), model.blocks[0].register_forward_pre_hook(_track), recording.of_blocks(model):
        model.train(training)
        with torch.set_grad_enabled(loss is not None):
            output = model(x)
        norms = _residual_norms(recording)
        return norms if loss is None else norms | _gradient_norms(loss(output), model, recording.tokens[:-1])


def _track(block: nn.Module, args: tuple) -> None:
    args[0].requires_grad_()  # its gradient is asked for, even where no weight before it learns


@torch.no_grad()
def _residual_norms(recording: Recording) -> dict[str, list[float | None]]:
    def whole(rms: Tensor | None) -> float | None:  # of the images' [B]
        return None if rms is None else float(rms.square().mean().sqrt())

    norms = {"stream": [whole(rms(before)) for before in recording.tokens[:-1]],
             "update": [whole(rms(after - before)) for before, after in pairwise(recording.tokens)],
             **{branch: [whole(found.get(branch)) for found in recording.branches] for branch in BRANCHES}}
    norms["update_ratio"] = [update / stream if stream else None
                             for update, stream in zip(norms["update"], norms["stream"])]
    return norms


def _gradient_norms(value: Tensor, model: nn.Module, streams: list[Tensor]) -> dict[str, list[float]]:
    groups = [[p for p in block.parameters() if p.requires_grad] for block in model.blocks]
    wanted = [*streams, *(p for group in groups for p in group)]
    found = iter(torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True))  # leaves `.grad` alone
    return {"gradient_stream": [float(next(found).norm()) for _ in streams],
            "gradient_weights": [float(torch.stack([next(found).norm() for _ in group]).norm()) if group else 0.0
                                 for group in groups]}


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Training flags, buffers and random state as they were, whatever happens inside."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with modes_kept(model), torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            yield
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)
