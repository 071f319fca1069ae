"""Cells side by side as a reader sees them: a live table in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from deepvit.config.json_lines import read_json_lines
from deepvit.engine.progress import clock
from deepvit.errors import DONE, STOPPED
from deepvit.run.console import say

TAIL = 1 << 16  # bytes at the end of a file that hold its newest lines


@dataclass(eq=False)
class Row:
    """A cell as it is shown. `work`: its training's, up to a factor common to all cells. Times are monotonic seconds;
    `first`, `step` and `steps`: where the run began this time, is and ends."""

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
        """What its run has written since."""
        with suppress(OSError):
            for line in read_json_lines(self.folder / "events.jsonl", TAIL):
                if "steps" in line:
                    self.first, self.steps = line["step"], line["steps"]
            for line in read_json_lines(self.folder / "metrics.jsonl", TAIL):
                self.step = max(self.first, line["step"])
                self.top1 = line.get("top1", self.top1)
                self.loss = line["loss"] if "lr" in line else self.loss

    @property
    def seconds(self) -> float:
        return 0.0 if self.started is None else (self.ended or time.monotonic()) - self.started

    @property
    def share(self) -> float:
        return self.step / max(1, self.steps)

    @property
    def work_done(self) -> float:
        """Since it was started this time."""
        return self.work * (self.step - self.first) / max(1, self.steps)

    def left(self, pace: float | None) -> float | None:
        """Seconds; by its own pace (seconds for a unit of work) or, before it has one, by that of all."""
        pace = self.seconds / self.work_done if self.work_done else pace
        return None if pace is None else self.work * (1 - self.share) * pace

    def numbers(self) -> list[str]:
        return ["" if self.loss is None else f"loss {self.loss:.4f}",
                "" if self.top1 is None else f"top-1 {self.top1:.2f} %"]


class SweepTable:
    """The running cells, below the lines of those that ended; to be used as `with table.live`. `rows`: of all cells, in
    the order in which they start; `at_once`: how many run at the same time."""

    EVERY_S, LINES_EVERY_S = 1.0, 60.0  # between updates of the table, and between lines elsewhere

    def __init__(self, rows: Sequence[Row], at_once: int):
        self._rows, self._at_once, self._failed = rows, at_once, 0
        console = Console(file=sys.stdout, markup=False, highlight=False)
        self.live = Live(console=console, auto_refresh=False, transient=True, redirect_stderr=False)
        self._draws = console.is_terminal
        self._shown = time.monotonic()

    def start(self, row: Row) -> None:
        row.started = time.monotonic()
        if not self._draws:
            say(f"{row.title}  started")

    def end(self, row: Row, code: int, log: Path) -> None:
        row.read()
        row.ended = time.monotonic()
        self._failed += code not in (DONE, STOPPED)
        how = "stopped" if code == STOPPED else "failed"
        _say([row.title, "done", row.numbers()[1], f"in {clock(row.seconds)}"] if code == DONE else
             [row.title, f"{how}, see {log}"])

    def refresh(self) -> None:
        """Shows what has changed, if it is time."""
        if time.monotonic() - self._shown < (self.EVERY_S if self._draws else self.LINES_EVERY_S):
            return
        self._shown = time.monotonic()
        table = Table.grid("", "", "", "", "", "", padding=(0, 2, 0, 0), expand=True)
        table.columns[0].ratio, table.columns[0].no_wrap = 1, True
        for row in self._rows:
            if row.started is not None and row.ended is None:
                row.read()
                words = [f"{row.share:.0%}", *row.numbers(), f"left {clock(row.left(self._pace()))}"]
                table.add_row(row.title, ProgressBar(total=1.0, completed=row.share, width=12), *words)
                if not self._draws:
                    _say([row.title, *words])
        if self._draws:
            self.live.update(Group(table, self._summary()), refresh=True)
        else:
            say(self._summary())

    def _summary(self) -> str:
        failed = f", {self._failed} of them failed" if self._failed else ""
        ended = sum(row.ended is not None for row in self._rows)
        return f"Sweep: {ended} of {len(self._rows)} cells ended{failed}; left {clock(self._left())}"

    def _left(self) -> float | None:
        """Seconds: no less than the longest cell takes, nor than all take side by side."""
        left = [row.left(self._pace()) for row in self._rows if row.ended is None]
        return None if None in left else max([*left, sum(left) / self._at_once])

    def _pace(self) -> float | None:
        begun = [row for row in self._rows if row.work_done]
        return sum(row.seconds for row in begun) / sum(row.work_done for row in begun) if begun else None


def _say(words: Iterable[str]) -> None:
    say("  ".join(filter(None, words)))
