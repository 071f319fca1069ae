"""Updates whose loss or gradient is not finite are named and counted, and the first module that went wrong is found."""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deepvit.engine.checkpoint import Saver
from deepvit.engine.folder import RunFolder
from deepvit.engine.state import TrainState
from deepvit.engine.step import Stepper, Update
from deepvit.errors import Failure

LAG = 4  # steps after which the host asks a GPU what became of an update: by then it is known, and nobody waits
log = logging.getLogger(__name__)


class SkipWatch:
    """Follows a run's updates on the host. All ranks ask about the same update at the same step; after `most` skipped
    ones in a row the run ends with a Failure. `make_batches`: `(start, count) -> iterator` over global batches."""

    def __init__(self, state: TrainState, stepper: Stepper, folder: RunFolder, saver: Saver, most: int,
                 make_batches: Callable[[int, int], Iterator[Sequence[Any]]]):
        self._state, self._stepper, self._folder, self._saver = state, stepper, folder, saver
        self._most, self._make_batches, self._ranks = most, make_batches, stepper.ranks
        self._pending: deque[tuple[Update, list[Tensor]]] = deque()
        self._lag = LAG if self._ranks.device.type == "cuda" else 0

    def add(self, update: Update, batches: Sequence[Any]) -> None:
        self._pending.append((update, [batch.indices for batch in batches]))
        self.catch_up(self._lag)

    def catch_up(self, lag: int = 0) -> None:
        """Learns what became of every update so far, but for the last `lag`."""
        while len(self._pending) > lag:
            self._ask()

    def _ask(self) -> None:
        update, indices = self._pending.popleft()
        if not update.skipped:
            self._state.skipped_in_a_row = 0
            return
        self._state.skipped_in_a_row += 1
        shares = self._ranks.gather((torch.cat(indices).tolist(), float(update.local_loss)))
        if self._ranks.is_main:
            losses, norm, scaler = [loss for _, loss in shares], float(update.grad_norm), self._state.scaler
            self._folder.log_event("skipped", step=update.batch_index + 1, batch=update.batch_index,
                                   indices=sum((one for one, _ in shares), []), losses=losses, grad_norm=norm)
            log.warning("Step %d skipped: loss %s, gradient norm %g%s.", update.batch_index + 1,
                        ", ".join(f"{loss:g}" for loss in losses), norm,
                        f"; gradients are now scaled by {scaler.get_scale():g}" if scaler.is_enabled() else "")
        if self._state.skipped_in_a_row >= self._most:
            self._give_up(update.batch_index)

    def _give_up(self, number: int) -> None:
        self._saver.save_nonfinite(self._state)
        with self._ranks.sync_errors(), closing(self._make_batches(number, 1)) as stream:
            culprit = examine(self._stepper, self._state, next(stream), number).first
        culprits = [f"rank {rank}: {first}" for rank, first in enumerate(self._ranks.gather(culprit)) if first]
        where = culprits[0] if culprits else "but repeated it is finite, so the cause is the scaling or the machine"
        if self._ranks.is_main:
            self._folder.log_event("gave_up", step=self._state.step, batch=number, first=where)
        raise Failure(f"{self._state.skipped_in_a_row} batches in a row gave a loss or gradient that is not finite. "
                      f"First to go wrong in batch {number}, {where}; to see it: deepvit replay {self._folder.path} "
                      f"--batch {number}. To go on, give the same command with hydra.run.dir={self._folder.path} and "
                      f"either a lower optimizer.lr, an optimizer.clip_grad, or precision=bf16 or fp32.")


@dataclass
class Examination:
    """What the forward and backward passes over a batch showed."""

    loss: float = 0.0
    first: str | None = None  # in words, what was the first to be not finite
    # Module name -> [smallest, largest, largest gradient] of its output, in the order of the forward pass
    ranges: dict[str, list[float]] = field(default_factory=dict)

    def check(self, what: str, tensors: dict[str, Tensor]) -> None:
        for name, values in tensors.items():
            if self.first is None and (wrong := int((~torch.isfinite(values)).sum())):
                self.first = f"{what} {name} ({wrong} of {values.numel()} values)"

    def watch(self, name: str, module: nn.Module) -> Callable[[], None]:
        """Looks at every output of `module` and its gradient, until the function that is returned is called."""
        def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            values = output.detach()
            low, high, gradient = self.ranges.get(name, (math.inf, -math.inf, 0.0))
            self.ranges[name] = [min(low, float(values.min())), max(high, float(values.max())), gradient]
            self.check("the output of", {name: values})
            if output.requires_grad:
                output.register_hook(look_back)

        def look_back(gradient: Tensor) -> None:
            self.ranges[name][2] = max(self.ranges[name][2], float(gradient.abs().max()))
            self.check("the gradient at the output of", {name: gradient})

        return module.register_forward_hook(look).remove


def examine(stepper: Stepper, state: TrainState, batches: Sequence[Any], batch_index: int) -> Examination:
    """Repeats a rank's passes over its micro-batches of a global batch, watched module by module; leaves no trace."""
    model, found, share = state.model, Examination(), sum(map(len, batches))  # images
    with state.traceless(), ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.callback(found.watch(name, module))
        found.check("an input weight", dict(model.named_parameters()))
        for batch in stepper.seeded(batches, batch_index):
            x, y = stepper.prepare(batch, batch_index, stepper.ranks.device, training=True)
            loss = stepper.loss(model, x, y) * len(x) / share
            found.loss += float(loss.detach())
            state.scaler.scale(loss).backward()
        trained = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        found.check("the gradient of", trained)
    if found.first is None and not math.isfinite(found.loss):
        found.first = "the loss, though every module's output is finite"
    return found
