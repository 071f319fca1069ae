"""What a person sees while a run works: a bar in a terminal, plain lines elsewhere."""

import logging
import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)


class Display:
    """One bar at a time, with rate and time left. Without a terminal `note` prints lines and bars are silent.

    Args:
        shown: False on every rank but the first.
    """

    def __init__(self, shown: bool = True, stream: TextIO | None = None):
        stream = stream or sys.stderr  # as it is now, not as it was when this was imported
        self.terminal = shown and stream.isatty()
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=Console(file=stream),
            disable=not self.terminal, transient=True)

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def bar(self, title: str, total: int, done: int = 0) -> "Bar":
        return Bar(self._bars, self._bars.add_task(title, total=total, completed=done, text=""))


class Bar:
    """A bar of a `Display`; `close` removes it."""

    def __init__(self, bars: Progress, task: TaskID):
        self._bars, self._task = bars, task

    def advance(self, amount: int = 1) -> None:
        self._bars.advance(self._task, amount)

    def show(self, done: int, text: str) -> None:
        self._bars.update(self._task, completed=done, text=text)

    def close(self) -> None:
        self._bars.remove_task(self._task)


class Meter:
    """Rate over the time since it was last read: images per second, and the share of it spent waiting for data."""

    def __init__(self) -> None:
        self.total_images, self.total_seconds = 0, 0.0
        self._restart()

    def _restart(self) -> None:
        self._start, self._images, self._waited = time.perf_counter(), 0, 0.0

    def add(self, images: int, waited: float) -> None:
        self._images += images
        self._waited += waited

    def read(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._start, 1e-9)
        reading = {"images_per_s": self._images / seconds, "data_wait": self._waited / seconds}
        self.total_images += self._images
        self.total_seconds += seconds
        self._restart()
        return reading

    def pause(self) -> None:
        """Leaves out what follows until `resume` (an evaluation, a save)."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        self._start += time.perf_counter() - self._paused

    @property
    def images_per_s(self) -> float:
        return self.total_images / max(self.total_seconds, 1e-9)


def clock(seconds: float) -> str:
    """3661 -> "1:01:01"."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
