"""What is done about updates that the device skipped: named, counted, and a run of them ends the training."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepvit.engine.folder import RunFolder
from deepvit.engine.ranks import Ranks
from deepvit.engine.state import TrainState
from deepvit.engine.step import Stepper, Update
from deepvit.errors import Failure

LAG = 4  # steps after which the host asks a GPU what became of an update: it is known by then, and nobody waits

log = logging.getLogger(__name__)


class SkipWatch:
    """Follows the updates of a run on the host. All ranks ask about the same update at the same step.

    Args:
        most: skipped updates in a row after which the run ends.
        give_up: called with the index of the last of them; raises.
    """

    def __init__(self, state: TrainState, folder: RunFolder, ranks: Ranks, most: int, give_up: Callable[[int], None]):
        self._state, self._folder, self._ranks, self._most, self._give_up = state, folder, ranks, most, give_up
        self._pending: deque[tuple[Update, Sequence[Any]]] = deque()
        self._lag = LAG if ranks.device.type == "cuda" else 0

    def add(self, update: Update, batches: Sequence[Any]) -> None:
        self._pending.append((update, [batch.indices for batch in batches]))
        while len(self._pending) > self._lag:
            self._ask()

    def catch_up(self) -> None:
        """Learns what became of every update so far."""
        while self._pending:
            self._ask()

    def _ask(self) -> None:
        update, indices = self._pending.popleft()
        if not update.skipped:
            self._state.skipped_in_a_row = 0
            return
        self._state.skipped_in_a_row += 1
        shares = self._ranks.gather((torch.cat(indices).tolist(), float(update.local_loss)))
        if self._ranks.is_main:
            self._note(update, sum((one for one, _ in shares), []), [loss for _, loss in shares])
        if self._state.skipped_in_a_row >= self._most:
            self._give_up(update.batch_index)

    def _note(self, update: Update, indices: list[int], losses: list[float]) -> None:
        norm, scaler = float(update.grad_norm), self._state.scaler
        self._folder.log_event("skipped", step=update.batch_index + 1, batch=update.batch_index, indices=indices,
                               losses=losses, grad_norm=norm)
        scale = f"; gradients are now scaled by {scaler.get_scale():g}" if scaler.is_enabled() else ""
        log.warning("Step %d skipped: loss %s, gradient norm %g%s.", update.batch_index + 1,
                    ", ".join(f"{loss:g}" for loss in losses), norm, scale)


def give_up(state: TrainState, stepper: Stepper, batches: Sequence[Any], batch_index: int, folder: RunFolder) -> None:
    """Ends the run with what went wrong first and how to see it again.

    Raises:
        Failure: always.
    """
    culprit = stepper.examine(state, batches, batch_index).first
    culprits = [f"rank {rank}: {first}" for rank, first in enumerate(stepper.ranks.gather(culprit)) if first]
    where = culprits[0] if culprits else "seen again it is finite, so the cause lies in the scaling or the machine"
    if stepper.ranks.is_main:
        folder.log_event("gave_up", step=state.step, batch=batch_index, first=where)
    raise Failure(f"{state.skipped_in_a_row} batches in a row gave a loss or gradient that is not finite. "
                  f"First to go wrong in batch {batch_index}, {where}. To look at it again: "
                  f"deepvit replay {folder.path} --batch {batch_index}. To go on, lower optimizer.lr, "
                  f"set optimizer.clip_grad, or use precision=bf16 or fp32: the same command with that and "
                  f"hydra.run.dir={folder.path} continues from the last checkpoint.")
