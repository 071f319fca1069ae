"""Where numbers went wrong: the first module of a model whose output or gradient is not finite."""

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Examination:
    """What one or several forward and backward passes showed."""

    loss: float = 0.0  # their sum
    first: str | None = None  # in words, what was the first to be not finite
    # Module name -> [smallest, largest, largest gradient] of its output, in the order of the forward pass
    ranges: dict[str, list[float]] = field(default_factory=dict)


def examine(model: nn.Module, losses: Iterable[Tensor], scale: Callable[[Tensor], Tensor]) -> Examination:
    """Looks at every module of `model` while each of `losses` is computed, scaled and passed backward.

    Gradients are dropped and buffers (running statistics) put back.
    """
    found = Examination()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                if name:
                    hooks.callback(module.register_forward_hook(_look(name, found)).remove)
            _note(found, "an input weight", dict(model.named_parameters()))
            for loss in losses:
                found.loss += float(loss.detach())
                scale(loss).backward()
            _note(found, "the gradient of", {name: weight.grad for name, weight in model.named_parameters()
                                             if weight.grad is not None})
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    if found.first is None and not math.isfinite(found.loss):
        found.first = "the loss, though every module's output is finite"
    return found


def _look(name: str, found: Examination) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        values = output.detach()
        low, high, gradient = found.ranges.get(name, (math.inf, -math.inf, 0.0))
        found.ranges[name] = [min(low, float(values.min())), max(high, float(values.max())), gradient]
        _note(found, "the output of", {name: values})
        if output.requires_grad:
            output.register_hook(look_back)

    def look_back(gradient: Tensor) -> None:
        found.ranges[name][2] = max(found.ranges[name][2], float(gradient.abs().max()))
        _note(found, "the gradient at the output of", {name: gradient})

    return hook


def _note(found: Examination, what: str, tensors: dict[str, Tensor]) -> None:
    for name, values in tensors.items():
        if found.first is None and (wrong := int((~torch.isfinite(values)).sum())):
            found.first = f"{what} {name} ({wrong} of {values.numel()} values)"
