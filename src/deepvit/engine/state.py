"""All that changes while a model trains, and nothing else."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from deepvit.engine.statistics import RunningStatistics
from deepvit.errors import UserError


@dataclass
class TrainState:
    """Every rank holds the same state after every step.

    Attributes:
        step: global batches taken; the schedule's clock. Those whose update was skipped count as well.
        skipped_in_a_row: skipped updates since the last one that was made.
        evaluated: the step of the last evaluation.
        best: `{"top1": percent, "step": ...}` of the best evaluation so far.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    step: int = 0
    skipped_in_a_row: int = 0
    evaluated: int = 0
    best: dict[str, float] = field(default_factory=dict)

    COUNTERS = ("step", "skipped_in_a_row", "evaluated", "best")

    @cached_property
    def statistics(self) -> RunningStatistics:
        return RunningStatistics(self.model)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The model's. To walk through its modules costs milliseconds a step."""
        return list(self.model.parameters())

    @cached_property
    def averaged(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """The average's parameters, the model's; the average's buffers, the model's."""
        average = self.ema.module
        return list(average.parameters()), self.parameters, list(average.buffers()), list(self.model.buffers())

    @property
    def evaluated_model(self) -> nn.Module:
        """The weights that count: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def all_weights(self) -> list[nn.Parameter]:
        """The parameters of the model, and of the average if it is on."""
        return [*self.parameters, *([] if self.ema is None else self.ema.module.parameters())]

    def weights(self) -> dict[str, Any]:
        """The tensors of `model`, and of `ema` if it is on."""
        ema = {} if self.ema is None else {"ema": self.ema.module.state_dict()}
        return {"model": self.model.state_dict(), **ema}

    def state_dict(self) -> dict[str, Any]:
        counters = {name: getattr(self, name) for name in self.COUNTERS}
        return {**self.weights(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                **counters}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        if ("ema" in content) != (self.ema is not None):
            had, has = ("with", "without") if "ema" in content else ("without", "with")
            raise UserError(f"The run was started {had} a moving average and is continued {has} one: "
                            f"set ema.decay as it was, or start over with fresh=true.")
        self.model.load_state_dict(content["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(content["ema"])
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(content["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # the schedule sets it anew; a changed peak must not be undone
        if content["scaler"]:  # empty after training without one
            self.scaler.load_state_dict(content["scaler"])
        for name in self.COUNTERS:
            setattr(self, name, content[name])
        self.step = content.get("batch", self.step)  # until version 1 a skipped batch did not count as a step
