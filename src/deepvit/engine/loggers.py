"""Where a run's numbers go. A logger is whatever has these methods; adding one is one class."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from deepvit.engine.folder import RunFolder

log = logging.getLogger(__name__)


class Logger(Protocol):
    """Told on rank 0 alone. Its constructor learns at which step the run starts or goes on."""

    def log(self, group: str, values: Mapping[str, Any], step: int, epoch: float) -> None:
        """`values` of `group` (train, val, attention): numbers, or mappings and lists of them."""

    def log_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """uint8 `[height, width, 3]`."""

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`, the record that reports are made from: a line for each call; no images."""

    def __init__(self, folder: RunFolder):
        self._folder = folder

    def log(self, group: str, values: Mapping[str, Any], step: int, epoch: float) -> None:
        values = {"probe": values} if group == "attention" else values
        self._folder.log_metrics({"step": step, "epoch": epoch, **values})

    def log_image(self, name: str, pixels: np.ndarray, step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Curves `group/name` in `folder`: a view, never a source, so it may fail without the run's noticing.

    Args:
        step: what an earlier process wrote after it is forgotten.
    """

    def __init__(self, folder: Path, step: int):
        self._writer: SummaryWriter | None = None
        try:
            self._writer = SummaryWriter(folder, purge_step=step + 1)
        except (OSError, UnicodeEncodeError) as error:  # the latter: a folder's name that is not UTF-8
            self._give_up(error)

    def log(self, group: str, values: Mapping[str, Any], step: int, epoch: float) -> None:
        for name, value in _scalars(values):
            self._write("add_scalar", f"{group}/{name}", value, step)

    def log_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self._write("add_image", name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._write("close")

    def _write(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*arguments, **options)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.warning("TensorBoard's file cannot be written (%s); metrics.jsonl has all of it.",
                    getattr(error, "strerror", error))
        self._writer = None


class Loggers:
    """Several as one; none on all ranks but the first."""

    def __init__(self, loggers: Sequence[Logger] = ()):
        self._loggers = loggers

    def log(self, group: str, values: Mapping[str, Any], step: int, epoch: float) -> None:
        for logger in self._loggers:
            logger.log(group, values, step, epoch)

    def log_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        for logger in self._loggers:
            logger.log_image(name, pixels, step)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers by their path; lists block by block, `entropy/block_03`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from ((f"{prefix}{name}/block_{i:02d}", one) for i, one in enumerate(value) if one is not None)
        elif value is not None:
            yield f"{prefix}{name}", value
