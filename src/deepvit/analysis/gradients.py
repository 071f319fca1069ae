"""How loud each block is: the residual stream, what a block adds to it, and the gradients that reach it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deepvit.analysis.recording import BRANCHES, unwrap
from deepvit.errors import UserError


def block_norms(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None, *,
                training: bool = True) -> dict[str, list[float | None]]:
    """Residual and gradient norms of every block for one batch.

    Args:
        model: anything with `blocks`; x: images `[B, C, height, width]`.
        loss: from the model's output to a scalar, e.g. `lambda logits: F.cross_entropy(logits, y)`; None: no gradients.
        training: as the model trains (batch statistics, dropout), which the gradients of an untrained norm need; else
            in eval mode. Buffers, flags, gradients and random state are as before in both cases.
    Returns:
        lists with one entry per block, root mean squares over all entries unless named a norm:
        `stream` (the block's input), `update` (output minus input), `attention` and `mlp` (the two branches as they are
        added; None if the block has no `drop_path1`, `drop_path2`), `update_ratio` (update / stream),
        `gradient_stream` (d loss / d block input, Euclidean norm), `gradient_weights` (of all the block's parameters,
        Euclidean norm).
    Raises:
        UserError: the model has no `blocks`.
    """
    model = unwrap(model)
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
        if loss is None:
            return _table(seen)
        streams, weights = _gradients(loss(output), model, [record["input"] for record in seen])
    return _table(seen) | {
        "gradient_stream": [float(gradient.norm()) for gradient in streams],
        "gradient_weights": [float(torch.stack([g.norm() for g in group]).norm()) if group else 0.0
                             for group in weights]}


def _watch(stack: ExitStack, block: nn.Module, record: dict[str, Tensor]) -> None:
    def take_input(module: nn.Module, args: tuple) -> tuple:
        record["input"] = args[0] if args[0].requires_grad else args[0].requires_grad_()
        return (record["input"], *args[1:])

    def keep(name: str) -> Callable:
        return lambda module, args, output: record.__setitem__(name, output.detach())

    stack.enter_context(block.register_forward_pre_hook(take_input))
    stack.enter_context(block.register_forward_hook(keep("output")))
    for branch, name in BRANCHES.items():
        if isinstance(getattr(block, name, None), nn.Module):
            stack.enter_context(getattr(block, name).register_forward_hook(keep(branch)))


def _gradients(value: Tensor, model: nn.Module, inputs: list[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Gradients at the blocks' inputs, and of each block's parameters; `autograd.grad` leaves `.grad` alone."""
    groups = [[p for p in block.parameters() if p.requires_grad] for block in model.blocks]
    wanted = [*inputs, *(p for group in groups for p in group)]
    found = iter(torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True))
    return [next(found) for _ in inputs], [[next(found) for _ in group] for group in groups]


def _table(seen: list[dict[str, Tensor]]) -> dict[str, Any]:
    table: dict[str, list[float | None]] = {
        "stream": [_rms(record["input"].detach()) for record in seen],
        "update": [_rms(record["output"] - record["input"].detach()) for record in seen],
        **{branch: [_rms(record[branch]) if branch in record else None for record in seen]
           for branch in BRANCHES}}
    table["update_ratio"] = [update / stream if stream else None
                             for update, stream in zip(table["update"], table["stream"])]
    return table


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Training flags, buffers and random state as they were, whatever happens inside."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            yield
        finally:
            for module, training in flags:
                module.training = training
            for buffer, value in buffers:
                buffer.copy_(value)
