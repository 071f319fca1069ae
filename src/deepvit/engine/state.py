"""All that changes while a model trains, and nothing else."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from deepvit.engine.ranks import views_like


class RunningStatistics:
    """The buffers of what is in training mode. Every micro-batch moves them from where they stood before the update,
    and the update moves them by the mean of these moves: exact, since a running mean moves linearly. Counters move by
    one. `moved`: where this rank's micro-batches have moved the floating-point buffers to, flat; copies are views."""

    def __init__(self, model: nn.Module):
        moving = [named for module in model.modules() if module.training
                  for named in module.named_buffers(recurse=False)]
        self._floats = [buffer for _, buffer in moving if buffer.is_floating_point()]
        self._counters = [buffer for name, buffer in moving if name == "num_batches_tracked"]
        self._counted = [counter.clone() for counter in self._counters]
        self.moved = torch.zeros(sum(buffer.numel() for buffer in self._floats), device=next(model.parameters()).device)
        self._before = self.moved.clone()
        self._parts_moved, self._parts_before = (views_like(self._floats, flat) for flat in (self.moved, self._before))

    @torch.no_grad()
    def begin(self) -> None:
        """Notes where the buffers stand."""
        self.moved.zero_()
        _copy(self._floats, self._parts_before)
        _copy(self._counters, self._counted)

    @torch.no_grad()
    def take(self, share: float) -> None:
        """After a micro-batch of this share of the rank's images: notes its move and takes it back."""
        if self._floats:
            torch._foreach_add_(self._parts_moved, self._floats, alpha=share)
        self.put_back()

    @torch.no_grad()
    def put_back(self) -> None:
        _copy(self._parts_before, self._floats)
        _copy(self._counted, self._counters)

    @torch.no_grad()
    def move(self, unless: Tensor) -> None:
        """Moves the buffers by the update's own move; `unless` (bool scalar) leaves every bit as it was."""
        torch.where(unless, self._before, self.moved, out=self.moved)
        _copy(self._parts_moved, self._floats)
        if self._counters:
            torch._foreach_add_(self._counters, (~unless).long(), alpha=1)  # without alpha the host would wait for it


def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    if source:  # torch refuses empty lists
        torch._foreach_copy_(target, source)


@dataclass
class TrainState:
    """Every rank holds the same state after every step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    step: int = 0  # global batches taken, those whose update was skipped as well; the schedule's clock
    skipped_in_a_row: int = 0
    evaluated: int = 0  # step of the last evaluation
    best: dict[str, float] = field(default_factory=dict)  # `{"top1": percent, "step": ...}` of the best so far

    COUNTERS = ("step", "skipped_in_a_row", "evaluated", "best")

    @cached_property
    def statistics(self) -> RunningStatistics:
        return RunningStatistics(self.model)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The model's, kept because walking its modules costs milliseconds a step."""
        return list(self.model.parameters())

    @cached_property
    def _averaged(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        average = self.ema.module
        return list(average.parameters()), list(average.buffers()), list(self.model.buffers())

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that counts: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    @contextmanager
    def traceless(self) -> Iterator[None]:
        """Training mode, and at the end neither gradients nor a trace in running statistics and generators."""
        device = self.parameters[0].device
        self.statistics.begin()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                yield
            finally:
                self.statistics.put_back()
                self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def update_average(self, unless: Tensor) -> None:
        """Moves the average, if it is on, and copies the buffers to it; `unless` (bool scalar) leaves its weights."""
        if self.ema is None:
            return
        averages, copies, buffers = self._averaged
        moves = torch._foreach_sub(self.parameters, averages)
        torch._foreach_mul_(moves, (1 - self.ema.get_decay(self.step)) * ~unless)
        torch._foreach_add_(averages, moves)
        _copy(buffers, copies)

    def weights(self) -> dict[str, Any]:
        """The tensors of `model`, and of `ema` if it is on."""
        return {"model": self.model.state_dict(), **({} if self.ema is None else {"ema": self.ema.module.state_dict()})}

    def state_dict(self) -> dict[str, Any]:
        return {**self.weights(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                **{name: getattr(self, name) for name in self.COUNTERS}}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Of a state with the same settings (`run.resume.with_changes`)."""
        self.model.load_state_dict(content["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        if content["scaler"]:  # empty after training without one
            self.scaler.load_state_dict(content["scaler"])
        for name in self.COUNTERS:
            setattr(self, name, content[name])
        self.step = content.get("batch", self.step)  # until version 1 a skipped batch did not count as a step
