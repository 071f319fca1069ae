"""What a user sees while a run works: a bar in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn,
                           TimeRemainingColumn)
from rich.table import Column
from rich.text import Text

INTERVAL_S = 0.1  # between two drawings


class Display(Progress):
    """Bars below the log lines of a terminal, which rich prints above them; silent without one and if not `shown`.
    `replaces_lines`: whether a reader of standard output sees the bars, so that no line need repeat them."""

    def __init__(self, shown: bool = True):
        console = Console(file=sys.stderr)
        terminal = shown and sys.stderr.isatty() and not console.is_dumb_terminal
        self.replaces_lines, self._drawn = terminal and sys.stdout.isatty(), 0.0
        super().__init__(
            TextColumn("{task.description}"), MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)), _Details(console), TextColumn("left"),
            TimeRemainingColumn(), console=console, expand=True, transient=True, disable=not terminal,
            redirect_stdout=self.replaces_lines, auto_refresh=False)  # rich's thread may erase a line just printed

    def advance(self, task: TaskID, amount: float = 1) -> None:
        super().advance(task, amount)
        if time.monotonic() - self._drawn > INTERVAL_S:
            self.refresh()
            self._drawn = time.monotonic()


class _Details(ProgressColumn):
    """As many of a task's `details`, the most important first, as leave room for the rest and a short bar."""

    def __init__(self, console: Console):
        super().__init__(Column(no_wrap=True))
        self._console = console

    def render(self, task: Task) -> Text:
        used = len(f"{task.description} {task.total}/{task.total} ######## left 00:00:00")
        shown: list[str] = []
        for one in task.fields.get("details", ()):
            used += 1 + len(one)
            if used > self._console.width:
                break
            shown.append(one)
        return Text(" ".join(shown))


class Meter:
    """Images per second since it was last read, and the share of that time spent waiting for data."""

    def __init__(self) -> None:
        self.total_images, self.total_seconds = 0, 0.0
        self._start, self._images, self._waited = time.perf_counter(), 0, 0.0

    def add(self, images: int, waited: float) -> None:
        self._images += images
        self._waited += waited

    def peek(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._start, 1e-9)
        return {"seconds": seconds, "images_per_s": self._images / seconds, "data_wait": self._waited / seconds}

    def read(self) -> dict[str, float]:
        reading = self.peek()
        self.total_images += self._images
        self.total_seconds += reading.pop("seconds")
        self._start, self._images, self._waited = time.perf_counter(), 0, 0.0
        return reading

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of the rate (an evaluation, a save)."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    @property
    def images_per_s(self) -> float:
        return self.total_images / max(self.total_seconds, 1e-9)


def clock(seconds: float | None) -> str:
    """3661 -> "1:01:01"; None: not known."""
    return "-:--:--" if seconds is None else str(timedelta(seconds=int(seconds)))
