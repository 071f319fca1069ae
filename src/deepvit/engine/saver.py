"""Which checkpoints a run keeps, and what happens where the disk refuses one."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepvit.engine import checkpoint
from deepvit.engine.folder import RunFolder
from deepvit.engine.ranks import Ranks
from deepvit.engine.state import TrainState
from deepvit.errors import Failure

log = logging.getLogger(__name__)


class Saver:
    """Writes a run's checkpoints, on rank 0.

    Args:
        identity: what a checkpoint holds beside the state: the model's config, class names, the run's settings.
    """

    def __init__(self, folder: RunFolder, ranks: Ranks, identity: Mapping[str, Any]):
        self._folder, self._ranks = folder, ranks
        self._identity = identity

    def save_last(self, state: TrainState, must: bool = False,
                  otherwise: str = "Training goes on and tries again at the next save.") -> bool:
        """Whether the whole state was written; where it `must` be and was not, all ranks fail together."""
        error = self._write(self._folder.last, state, self._whole(state), otherwise, self._folder.previous)
        if must:
            self._ranks.raise_together(error)
        if error is None and self._ranks.is_main:
            self._folder.drop_replaced()
        return error is None

    def save_best(self, state: TrainState, metrics: Mapping[str, Any]) -> None:
        content = {**state.weights(), "step": state.step, "metrics": dict(metrics)}
        self._write(self._folder.best, state, content, "The best weights so far are not kept.")

    def save_epoch(self, state: TrainState) -> None:
        content = {**state.weights(), "step": state.step}
        self._write(self._folder.checkpoints / f"step-{state.step}.pt", state, content, "This epoch's are not kept.")

    def save_nonfinite(self, state: TrainState) -> None:
        self._write(self._folder.nonfinite, state, self._whole(state), "The weights cannot be looked at later.")

    def say_what_stays(self, state: TrainState) -> None:
        """What the run leaves on the disk, and a warning where that has no room."""
        if not self._ranks.is_main:
            return
        weights = checkpoint.size_of(state.weights())
        trained = [weight for group in state.optimizer.param_groups for weight in group["params"]]
        # As many moments as Adam's where the optimizer allocates its own only at its first update.
        moments = checkpoint.size_of(state.optimizer.state_dict()["state"]) or 2 * checkpoint.size_of(trained)
        whole = weights + moments
        log.info("Checkpoints: last and previous of %s each, best of %s; engine.keep=best leaves the best alone.",
                 _size(whole), _size(weights))
        needed, free = 3 * whole + weights, shutil.disk_usage(self._folder.path).free  # a third while one is written
        if needed > free:
            log.warning("The checkpoints of this run may need %s, and %s are free at %s.", _size(needed), _size(free),
                        self._folder.path)

    def _whole(self, state: TrainState) -> dict[str, Any]:
        return {**state.state_dict(), "world": self._ranks.world}

    def _write(self, path: Path, state: TrainState, content: dict[str, Any], otherwise: str,
               previous: Path | None = None) -> Failure | None:
        """A checkpoint that cannot be written does not end a run that may write its next one."""
        if not self._ranks.is_main:
            return None
        try:
            checkpoint.save(path, {**content, **self._identity}, previous)
            return None
        except Failure as error:
            log.error("%s %s", error, otherwise)
            self._folder.log_event("save_failed", step=state.step, reason=str(error))
            return error


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"
