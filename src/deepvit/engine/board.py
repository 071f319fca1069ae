"""TensorBoard as a view of a run, never a source: it may fail without the run's noticing."""

import logging
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class Board:
    """Scalars of a run in `folder`; what an earlier process drew after `step` is forgotten."""

    def __init__(self, folder: Path, step: int):
        self._writer: SummaryWriter | None = SummaryWriter(folder, purge_step=step + 1)

    def draw(self, group: str, values: dict[str, float], step: int) -> None:
        """`values` as curves `group/name`, if TensorBoard's files can be written."""
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)
        except OSError as error:
            self._give_up(error)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """uint8 `[height, width, 3]`, likewise."""
        try:
            if self._writer is not None:
                self._writer.add_image(name, pixels, step, dataformats="HWC")
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning("TensorBoard's file cannot be written (%s); metrics.jsonl has all of it.", error.strerror)
        self._writer = None
