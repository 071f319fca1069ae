"""How loud each block is: the residual stream, what a block adds to it, and the gradients that reach it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from deepvit.analysis.recording import BRANCHES, branches_of, modes_kept
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
    seen: list[dict[str, Tensor]] = [{} for _ in model.blocks]
    with ExitStack() as stack:
        stack.enter_context(_as_before(model))
        for block, record in zip(model.blocks, seen):
            _watch(stack, block, record)
        model.train(training)
        with torch.set_grad_enabled(loss is not None):
            output = model(x)
        norms = _residual_norms(seen)
        return norms if loss is None else norms | _gradient_norms(loss(output), model, seen)


def _watch(stack: ExitStack, block: nn.Module, record: dict[str, Tensor]) -> None:
    def keep(name: str) -> Callable:
        return lambda module, args, output: record.__setitem__(name, output.detach())

    stack.enter_context(block.register_forward_pre_hook(
        lambda module, args: record.__setitem__("input", args[0].requires_grad_())))
    stack.enter_context(block.register_forward_hook(keep("output")))
    for branch, module in branches_of(block).items():
        stack.enter_context(module.register_forward_hook(keep(branch)))


def _residual_norms(seen: list[dict[str, Tensor]]) -> dict[str, list[float | None]]:
    def rms(x: Tensor) -> float:
        return float(x.float().square().mean().sqrt())

    norms: dict[str, list[float | None]] = {
        "stream": [rms(record["input"].detach()) for record in seen],
        "update": [rms(record["output"] - record["input"].detach()) for record in seen],
        **{branch: [rms(record[branch]) if branch in record else None for record in seen] for branch in BRANCHES}}
    norms["update_ratio"] = [update / stream if stream else None
                             for update, stream in zip(norms["update"], norms["stream"])]
    return norms


def _gradient_norms(value: Tensor, model: nn.Module, seen: list[dict[str, Tensor]]) -> dict[str, list[float]]:
    groups = [[p for p in block.parameters() if p.requires_grad] for block in model.blocks]
    wanted = [*(record["input"] for record in seen), *(p for group in groups for p in group)]
    found = iter(torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True))  # leaves `.grad` alone
    return {"gradient_stream": [float(next(found).norm()) for _ in seen],
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
