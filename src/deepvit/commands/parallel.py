"""The cells of a sweep side by side, each a process group on its own devices, shown in a live table or plain lines."""

import ctypes
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sklearn.datasets  # noqa: F401  before the cells are forked, for all of them, as is what follows
import sklearn.model_selection  # noqa: F401
import torch
import torch.utils.tensorboard  # noqa: F401
from hydra.core.utils import JobReturn, JobStatus, run_job
from omegaconf import DictConfig, OmegaConf
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from deepvit.commands.sweep import OpenSweep, Recorder, composed_cell
from deepvit.config.records import read_json_lines
from deepvit.engine.device import usable_cores
from deepvit.engine.progress import clock
from deepvit.engine.signals import StopRequest, handled_signals, stop_requests
from deepvit.errors import DONE, FAILED, STOPPED
from deepvit.models.registry import build_model, count_parameters
from deepvit.run import evaluate, train  # noqa: F401
from deepvit.run.console import say
from deepvit.run.launch import end_of

POLL_S = 0.1
TAIL = 1 << 16  # bytes at the end of a file that hold its newest lines
SET_PDEATHSIG = 1  # prctl(2)
FORK = multiprocessing.get_context("fork")  # torch is imported once, which takes longer than many a small cell


@dataclass(eq=False)
class Cell:
    """A cell of the sweep. `work`: its training's, up to a factor common to all cells. Times are monotonic seconds;
    `first`, `step` and `steps`: where the run began this time, is and ends."""

    title: str
    folder: Path
    work: float
    number: int = 0
    overrides: Sequence[str] = ()
    config: DictConfig | None = None
    log: Path | None = None
    places: Sequence[str] = ()  # what it runs on, once it is started
    process: BaseProcess | None = None
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


def run_side_by_side(job_overrides: Sequence[Sequence[str]], first: int, cells_per_device: int, config: DictConfig,
                     **hydra: Any) -> list[JobReturn]:
    """What Hydra asks of a launcher: runs the cells, numbered from `first` on. The sweep's record says how each ended.
    `hydra`: `hydra_context` and `task_function`."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a process that has asked CUDA itself cannot fork
    sweep = Recorder.opened
    with stop_requests() as stop, TemporaryDirectory() as passing:
        logs = sweep.record.path.with_suffix("") if sweep.is_kept else Path(passing)
        shared = set.intersection(*map(set, job_overrides))
        machine = Machine(config.engine, cells_per_device)
        cells = []
        for number, overrides in enumerate(job_overrides, first):
            with composed_cell(config, number, overrides) as (cell, subdir):
                work = _work_of(cell)
            cell.engine.threads = machine.threads(cell.engine)
            title = " ".join([f"[{number + 1}]", *(word for word in overrides if word not in shared)])
            cells.append(Cell(title, Path(cell.hydra.sweep.dir, subdir), work, number, overrides, cell,
                              log=logs / f"{number + 1}.log"))
        Crew(sweep, cells, machine, stop, hydra).run()
    found = {line["cell"]: line["value"]["top1"] for line in sweep.record.outcomes() if "top1" in line["value"]}
    return [JobReturn(status=JobStatus.COMPLETED, _return_value=found.get(cell.number)) for cell in cells]


def _work_of(config: DictConfig) -> float:
    """Parameters x tokens x length of a training; 0 where its settings are invalid or nothing is trained."""
    try:
        with torch.device("meta"):
            model = build_model(OmegaConf.to_container(config.model, resolve=True))
        length = config.schedule.steps or config.schedule.epochs * config.data.fraction
        return count_parameters(model) * model.pos_embed.shape[1] * length
    except Exception:  # of any kind that settings can lead to; the cell itself will report it
        return 0.0


class Machine:
    """Its places for cells: GPUs, each as often as cells may share it, or cores."""

    def __init__(self, engine: DictConfig, cells_per_device: int):
        self._gpus = [] if engine.accelerator == "cpu" else _visible_gpus()
        self._places = Counter(self._gpus * cells_per_device or map(str, range(usable_cores())))

    def threads(self, engine: DictConfig) -> int | None:
        """Of a cell; on a CPU never a consequence of how many run, or its numbers would be one too."""
        if engine.threads is not None or self._gpus:
            return engine.threads
        return torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS") else 1

    def _size(self, engine: DictConfig) -> int:
        """How many places a cell takes; one whose settings are not numbers takes one, and reports them itself."""
        devices, threads = (number if isinstance(number, int) and number > 0 else 1
                            for number in (engine.devices, 1 if self._gpus else self.threads(engine)))
        return min(devices * threads, len(self._places))

    def at_once(self, engine: DictConfig) -> int:
        return self._places.total() // self._size(engine)

    def free(self, engine: DictConfig, taken: Iterable[Sequence[str]]) -> list[str]:
        """Free places for a cell besides those that are taken, the emptiest first; none where too few are free."""
        left = self._places - Counter(place for places in taken for place in places)
        return [place for place, _ in left.most_common(size)] if len(left) >= (size := self._size(engine)) else []

    def environment(self, cell: Cell) -> dict[str, str]:
        sharing = max(self._places.values()) if self._gpus else self.at_once(cell.config.engine)
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(cell.places)} if self._gpus else {}
        return {**devices, "DEEPVIT_SHARE": f"1/{sharing}"}


def _visible_gpus() -> list[str]:
    """As `CUDA_VISIBLE_DEVICES` names them; counted by another process, since one that used CUDA cannot fork."""
    counting = FORK.Process(target=lambda: sys.exit(torch.cuda.is_available() and torch.cuda.device_count()))
    counting.start()
    counting.join()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (given.split(",") if given else [str(number) for number in range(256)])[:max(0, counting.exitcode)]


class Crew:
    """Starts the cells that have a place, invalid ones first and then the longest, and records how each ended."""

    def __init__(self, sweep: OpenSweep, cells: list[Cell], machine: Machine, stop: StopRequest, hydra: dict[str, Any]):
        self._sweep, self._machine, self._stop, self._hydra = sweep, machine, stop, hydra
        self._waiting = sorted(cells, key=lambda cell: -cell.work or -math.inf)
        self._running: list[Cell] = []
        at_once = machine.at_once(cells[0].config.engine)
        self._table = SweepTable(list(self._waiting), at_once)
        say(f"{len(cells)} cells, {at_once} at once; what they print goes to {cells[0].log.parent}/*.log")

    def run(self) -> None:
        """Returns when every cell has ended. A request to stop is passed on to those that run; no other starts."""
        called_off = STOPPED in (line["code"] for line in self._sweep.record.outcomes())  # an earlier batch was
        try:
            with self._table.live:
                while self._waiting or self._running:
                    if self._stop and not called_off:
                        called_off = True
                        for cell in self._running:
                            os.kill(cell.process.pid, signal.Signals[self._stop.name])
                    while called_off and self._waiting:
                        self._note(self._waiting.pop(0), STOPPED, "Not started.")
                    while cell := self._next():
                        self._start(cell)
                    for cell in [cell for cell in self._running if not cell.process.is_alive()]:
                        self._end(cell)
                    self._table.refresh()
                    time.sleep(POLL_S)
        finally:
            for cell in self._running:  # after a defect here
                cell.process.terminate()

    def _next(self) -> Cell | None:
        """One that has its places. Two cells of one folder run one after the other."""
        for cell in self._waiting:
            cell.places = self._machine.free(cell.config.engine, [other.places for other in self._running])
            if cell.places and cell.folder not in (other.folder for other in self._running):
                return cell
        return None

    def _start(self, cell: Cell) -> None:
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        cell.log.touch()
        cell.process = FORK.Process(target=self._run, args=(cell,))
        cell.process.start()
        self._waiting.remove(cell)
        self._running.append(cell)
        self._table.start(cell)

    def _run(self, cell: Cell) -> None:
        """The cell's process."""
        os.setsid()  # Ctrl-C in a terminal reaches the sweep alone, which passes it on
        ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGTERM)  # no cell outlives its sweep, however that dies
        for number in handled_signals():
            signal.signal(number, signal.SIG_DFL)
        if self._stop:  # it came before the line above
            os._exit(STOPPED)
        with cell.log.open("ab", buffering=0) as log:
            os.dup2(log.fileno(), sys.__stdout__.fileno())
            os.dup2(log.fileno(), sys.__stderr__.fileno())
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not those of the table
        os.environ.update(self._machine.environment(cell))
        result = run_job(config=cell.config, job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir",
                         **self._hydra)
        result.return_value  # noqa: B018  raises what ended the job

    def _end(self, cell: Cell) -> None:
        with suppress(ProcessLookupError):
            os.killpg(cell.process.pid, signal.SIGKILL)  # what it may have left on a device
        self._running.remove(cell)
        outcomes, code = {line["cell"]: line["code"] for line in self._sweep.record.outcomes()}, cell.process.exitcode
        if cell.number not in outcomes:
            stopped = self._stop and code in (STOPPED, -signal.Signals[self._stop.name])
            outcomes[cell.number] = STOPPED if stopped else FAILED
            self._note(cell, outcomes[cell.number], "Not started." if stopped else
                       f"Its process {end_of(code)}; its last words are in {cell.log}. The same command continues it.")
        self._table.end(cell, outcomes[cell.number])
        if not self._sweep.is_kept:
            say(cell.log.read_text(errors="replace"))

    def _note(self, cell: Cell, code: int, sentence: str) -> None:
        self._sweep.record.add(cell.number, cell.overrides, code, sentence, cell.folder, {})


class SweepTable:
    """The running cells, below the lines of those that ended; to be used as `with table.live`. `rows`: all cells, in
    the order in which they start; `at_once`: how many run at the same time."""

    EVERY_S, LINES_EVERY_S = 1.0, 60.0  # between updates of the table, and between lines elsewhere

    def __init__(self, rows: Sequence[Cell], at_once: int):
        self._rows, self._at_once, self._failed = rows, at_once, 0
        console = Console(file=sys.stdout, markup=False, highlight=False)
        self.live = Live(console=console, auto_refresh=False, transient=True, redirect_stderr=False)
        self._draws = console.is_terminal
        self._shown = time.monotonic()

    def start(self, row: Cell) -> None:
        row.started = time.monotonic()
        if not self._draws:
            say(f"{row.title}  started")

    def end(self, row: Cell, code: int) -> None:
        row.read()
        row.ended = time.monotonic()
        self._failed += code not in (DONE, STOPPED)
        _say([row.title, "done", row.numbers()[1], f"in {clock(row.seconds)}"] if code == DONE else
             [row.title, f"{'stopped' if code == STOPPED else 'failed'}, see {row.log}"])

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
