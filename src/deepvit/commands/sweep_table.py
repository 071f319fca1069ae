"""What a person sees of cells side by side: a live table in a terminal, plain lines elsewhere."""

import heapq
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from deepvit.config.sweep_record import read_lines
from deepvit.engine.progress import clock
from deepvit.errors import DONE, STOPPED
from deepvit.run.console import say

TAIL = 1 << 16  # bytes at the end of a file in which its newest lines stand


@dataclass(eq=False)
class Row:
    """A cell as it is shown. `work`: its training's operations but for a factor that all cells share. Times are
    monotonic seconds; `first`, `step` and `steps`: where the run began this time, is and ends."""

    title: str
    folder: Path
    work: float
    started: float | None = None
    ended: float | None = None
    first: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    top1: float | None = None

    def read(self) -> None:
        """What its run has written down since."""
        begun = [line for line in read_lines(self.folder / "events.jsonl", TAIL) if "steps" in line]
        if begun:
            self.first, self.steps = begun[-1]["step"], begun[-1]["steps"]
        for line in read_lines(self.folder / "metrics.jsonl", TAIL):
            self.step = max(self.first, line["step"])
            if "top1" in line:
                self.top1 = line["top1"]
            elif "lr" in line:
                self.loss = line["loss"]

    @property
    def seconds(self) -> float:
        return 0.0 if self.started is None else (self.ended or time.monotonic()) - self.started

    @property
    def share(self) -> float:
        """Of what it had to do this time."""
        return (self.step - self.first) / max(1, self.steps - self.first)

    @property
    def work_done(self) -> float:
        return self.work * (self.step - self.first) / max(1, self.steps)

    def left(self, seconds_per_work: float | None) -> float | None:
        """Seconds; by its own pace or, before it has one, by the others'."""
        if self.share:
            return self.seconds * (1 - self.share) / self.share
        return max(0.0, self.work * seconds_per_work - self.seconds) if self.work and seconds_per_work else None


class SweepTable:
    """The cells that run, below the lines of those that ended.

    Args:
        rows: of all cells, in the order in which they start.
        at_once: how many run at the same time.
    """

    EVERY_S, LINES_EVERY_S = 1.0, 60.0  # a drawing in a terminal, and lines elsewhere

    def __init__(self, rows: Sequence[Row], at_once: int):
        self._rows, self._at_once, self._ended, self._failed = rows, at_once, 0, 0
        self._console = Console(file=sys.stdout)
        self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False,
                          redirect_stderr=False) if self._console.is_terminal else None
        self._shown = time.monotonic()

    def __enter__(self) -> "SweepTable":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live:
            self._live.stop()

    def start(self, row: Row) -> None:
        row.started = time.monotonic()
        if not self._live:
            say(f"{row.title}  started")

    def end(self, row: Row, code: int, log: Path) -> None:
        row.read()
        row.ended, self._ended = time.monotonic(), self._ended + 1
        if code == DONE:
            self.say("  ".join([row.title, "done", *_numbers(row)[-1:], f"in {clock(row.seconds)}"]))
        else:
            self._failed += code != STOPPED
            self.say(f"{row.title}  {'stopped' if code == STOPPED else 'failed'}, see {log}")

    def say(self, line: str) -> None:
        """A line above the table."""
        if self._live:
            self._console.print(line, markup=False, highlight=False)
        else:
            say(line)

    def refresh(self) -> None:
        """Draws what has changed, if it is time."""
        if time.monotonic() - self._shown < (self.EVERY_S if self._live else self.LINES_EVERY_S):
            return
        self._shown = time.monotonic()
        running = [row for row in self._rows if row.started is not None and row.ended is None]
        for row in running:
            row.read()
        if self._live:
            self._live.update(self._table(running), refresh=True)
            return
        for row in running:
            say("  ".join([row.title, f"{row.share:.0%}", *_numbers(row), f"left {_clock(row.left(self._pace()))}"]))
        say(self._sum())

    def _table(self, running: Sequence[Row]) -> Table:
        table = Table("cell", "", "", "loss", "top-1", "left", box=None, expand=True, caption=self._sum(),
                      caption_justify="left")
        table.columns[0].ratio, table.columns[0].no_wrap = 1, True
        for row in running:
            table.add_row(row.title, ProgressBar(total=1.0, completed=row.share, width=12), f"{row.share:.0%}",
                          "" if row.loss is None else f"{row.loss:.4f}",
                          "" if row.top1 is None else f"{row.top1:.2f} %", _clock(row.left(self._pace())))
        return table

    def _sum(self) -> str:
        failed = f", {self._failed} of them failed" if self._failed else ""
        return f"Sweep: {self._ended} of {len(self._rows)} cells ended{failed}; left {_clock(self._left())}"

    def _pace(self) -> float | None:
        """Seconds for a unit of work, over all cells so far."""
        begun = [row for row in self._rows if row.work_done]
        return sum(row.seconds for row in begun) / sum(row.work_done for row in begun) if begun else None

    def _left(self) -> float | None:
        """Seconds until the last cell ends, each starting in the first place that becomes free."""
        left = [(row, row.left(self._pace())) for row in self._rows if row.ended is None]
        if any(seconds is None for _, seconds in left):
            return None
        ends = [seconds for row, seconds in left if row.started is not None]
        ends += [0.0] * (self._at_once - len(ends))
        heapq.heapify(ends)
        for row, seconds in left:
            if row.started is None:
                heapq.heapreplace(ends, ends[0] + seconds)
        return max(ends)


def _numbers(row: Row) -> list[str]:
    return ([] if row.loss is None else [f"loss {row.loss:.4f}"]) + (
        [] if row.top1 is None else [f"top-1 {row.top1:.2f} %"])


def _clock(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else clock(seconds)
