"""How loud each block is: the residual stream, what a block adds to it, and the gradients that reach it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from deepvit.analysis.recording import BRANCHES, Recording, modes_kept, rms
from deepvit.errors import UserError


def block_norms(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None, *,
                training: bool = True) -> dict[str, list[float | None]]:
    """Residual and gradient norms of every block of a model with `blocks`, on images `[B, C, height, width]`.

    Lists with one entry per block, root mean squares over all entries: `stream` (the block's input), `update` (output
    minus input), `attention` and `mlp` (the branches as they are added; None if the block has no `drop_path1`,
    `drop_path2`), `update_ratio` (update / stream). With `loss`, from the model's output to a scalar, such as `lambda
    logits: F.cross_entropy(logits, y)`, also Euclidean norms: `gradient_stream` (d loss / d block input) and
    `gradient_weights` (of all the block's parameters).

    `training`: as the model trains (batch statistics, dropout), which the gradients of an untrained norm need; else in
    eval mode. Buffers, flags, gradients and random state are left alone. Raises UserError if there are no `blocks`.
    """
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
