"""A run folder: one owner at a time, results as JSON lines that survive a kill, and a record of what happened."""

import errno
import fcntl
import json
import logging
import math
import os
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, BinaryIO, ClassVar

import yaml

from deepvit.config.records import read_json_lines, written_for_us
from deepvit.engine.ranks import Ranks
from deepvit.errors import UserError

MARK = ".deepvit-run"  # the first file that a run writes, which makes the folder its own
CHECKPOINT = re.compile(r"(last|previous|best|nonfinite|step-\d+)\.pt(\.sha256)?(\.tmp)?")
SETTINGS = {"model", "data", "augment", "optimizer", "schedule", "engine"}  # keys of every run's config.yaml
log = logging.getLogger(__name__)


class RunFolder:
    """The paths of a run and its append-only files. Rank 0 owns it; the others read it and append events. A folder is a
    run's only if it says so, and even there only files with our own names are replaced or removed. The lock is the
    kernel's (`lockf`): it ends with its process, however that dies, so none is ever stale. (Not `flock`, which the
    processes that load images would inherit and hold for seconds after a SIGKILL.)"""

    _claimed: ClassVar[set[Path]] = set()  # by this process, which its own lockf would not keep out
    OWN = ("config.yaml", "metrics.jsonl", "metrics.json", "events.jsonl", "train.log")

    def __init__(self, path: Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.last, self.previous = self.checkpoints / "last.pt", self.checkpoints / "previous.pt"
        self.best, self.nonfinite = self.checkpoints / "best.pt", self.checkpoints / "nonfinite.pt"
        self.metrics, self.events = self.path / "metrics.jsonl", self.path / "events.jsonl"
        self.result, self.config = self.path / "metrics.json", self.path / "config.yaml"
        self.mark, self.aside = self.path / MARK, self.path / ".replaced"
        self._lock: IO[str] | None = None
        self._waiting: dict[Path, str] = {}

    @contextmanager
    def claimed(self, ranks: Ranks, fresh: bool = False, restarted: bool = False) -> Iterator[bool]:
        """Rank 0 owns the folder, on behalf of all; see `claim`."""
        with ranks.sync_errors():
            starts_over = ranks.is_main and self.claim(fresh, restarted)
        try:
            yield ranks.gather(starts_over)[0]
        finally:
            self.release()

    def claim(self, fresh: bool = False, restarted: bool = False) -> bool:
        """Makes the folder, marks it as a run's, proves that it can be written, and takes its lock. UserError if it is
        not a run's, not writable, or in use by another process (named). Returns whether an earlier run is still to be
        replaced, as `fresh` asks; where the launcher `restarted` us, what is there may be this command's own."""
        if self.path.resolve() in self._claimed:
            raise UserError(f"The run folder {self.path} is in use by this very process.")
        self._lock = self._take_lock(self._open())
        self._claimed.add(self.path.resolve())
        for partial in self._own_files(self.path):
            if partial.suffix == ".tmp":
                partial.unlink()
        starts_over = (self._finish_replacement() or not restarted) and fresh
        if starts_over:
            self.aside.mkdir(exist_ok=True)
        return starts_over

    def _open(self) -> IO[str]:
        try:
            if self.path.is_dir() and not self.is_ours():
                raise UserError(f"The folder {self.path} holds files that do not belong to a run, such "
                                f"as {min(self.path.iterdir()).name}: give an empty or new one with hydra.run.dir=...")
            self.path.mkdir(parents=True, exist_ok=True)
            self.mark.touch()
            self.checkpoints.mkdir(exist_ok=True)
            lock = (self.path / "lock").open("a+")
            for folder in (self.path, self.checkpoints):  # a full disk shows itself now, not after the first epoch
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.write(bytes(4096))
            return lock
        except OSError as error:
            raise UserError(f"The run folder {self.path} cannot be written ({error.strerror}): "
                            f"choose another with hydra.run.dir=...") from error

    def _take_lock(self, lock: IO[str]) -> IO[str]:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            raise UserError(f"The run folder {self.path} is in use by {owner}: wait for it or stop it.") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        return lock

    def release(self) -> None:
        """Gives the lock back; a folder in which nothing was started is left as it was found."""
        if self._lock is None:
            return
        self._finish_replacement()
        if not self.config.exists():
            (self.path / "lock").unlink(missing_ok=True)
            with suppress(OSError):
                self.checkpoints.rmdir()
            if [*self.path.iterdir()] == [self.mark]:
                self.mark.unlink()
        self._lock.close()
        self._lock = None
        self._claimed.discard(self.path.resolve())

    def is_ours(self) -> bool:
        """Empty but for Hydra's `hydra.output_subdir`, marked by a run, or begun by a version that set no mark."""
        if self.mark.exists() or all(written_for_us(path / "hydra.yaml") for path in self.path.iterdir()):
            return True
        with suppress(OSError):
            begun = any(event.get("event") in ("start", "resume") for event in read_json_lines(self.events))
            return begun and self.read_config().keys() >= SETTINGS
        return False

    # `fresh=true`: the earlier run goes only when the new one's first checkpoint stands. Until then it lies aside, and
    # last.pt, the first file to be moved and the first to be written anew, tells which of the two is whole.

    def set_aside(self) -> None:
        """Makes room for a new run; the earlier one comes back if that does not get to its first checkpoint."""
        self._move(self.path, self.aside)

    def drop_replaced(self) -> None:
        """Forgets the earlier run, once the new run's first checkpoint stands."""
        for path in list(self._own_files(self.aside)):
            path.unlink()
        for folder in (self.aside / "checkpoints", self.aside):
            with suppress(OSError):
                folder.rmdir()

    def _finish_replacement(self) -> bool:
        """Ends what an interrupted `fresh=true` began; whether the earlier run stands (again)."""
        if not self.aside.exists():
            return False
        stands = not (self.last.exists() and any(self._own_files(self.aside)))
        if stands:
            self._move(self.aside, self.path)
        self.drop_replaced()
        return stands

    def _move(self, source: Path, target: Path) -> None:
        (target / "checkpoints").mkdir(parents=True, exist_ok=True)
        for path in list(self._own_files(source)):
            os.replace(path, target / path.relative_to(source))

    def _own_files(self, base: Path) -> Iterable[Path]:
        """What a run wrote below `base`, last.pt first; other files there are somebody else's."""
        checkpoints = [path for path in base.glob("checkpoints/*.pt*") if CHECKPOINT.fullmatch(path.name)]
        yield from sorted(checkpoints, key=lambda path: path != base / "checkpoints" / self.last.name)
        yield from (path for name in self.OWN if (path := base / name).exists())
        yield from base.glob("events.out.tfevents.*")

    def read_config(self) -> dict[str, Any]:
        """The settings in config.yaml, which may be anything; empty where it is missing, torn or no mapping."""
        try:
            config = yaml.safe_load(self.config.read_text())
        except (OSError, ValueError, yaml.YAMLError):  # ValueError: not UTF-8, or a date such as 2020-13-99
            return {}
        return config if isinstance(config, dict) else {}

    def is_finished(self) -> bool:
        result = self.read_result()
        return bool(result.get("finished")) and "top1" in result and isinstance(result.get("steps"), int)

    def read_result(self) -> dict[str, Any]:
        """`metrics.json`, or an empty dict where there is none (or a torn one, or somebody else's)."""
        try:
            result = json.loads(self.result.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return result if isinstance(result, dict) and isinstance(result.get("top1", 0), int | float) else {}

    def write_result(self, result: dict[str, Any]) -> None:
        write_text_synced(self.result, json.dumps(plain(result), indent=1, allow_nan=False) + "\n")

    def log_metrics(self, line: dict[str, Any]) -> None:
        self._append(self.metrics, line)

    def log_event(self, event: str, **details: Any) -> None:
        self._append(self.events, {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **details})

    def _append(self, path: Path, line: dict[str, Any]) -> None:
        """Adds a line now or, where the disk refuses, together with the next one: none is lost unless we die."""
        waiting = self._waiting.pop(path, "") + json.dumps(plain(line), allow_nan=False) + "\n"
        try:
            with path.open("ab", buffering=0) as file:
                size, text = file.tell(), waiting.encode()
                if (written := file.write(text)) < len(text):
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, f"{written} of {len(text)} bytes were taken")
        except OSError as error:
            self._waiting[path] = waiting
            log.warning("%s cannot be written (%s); its lines wait in memory.", path, error.strerror)

    def run_id(self) -> str:
        """The run's name in viewers: the same however often it is resumed, another after `fresh=true`."""
        known = (event["run_id"] for event in read_json_lines(self.events) if "run_id" in event)
        return next(known, uuid.uuid4().hex[:8])

    def last_evaluation(self, until: int) -> int:
        """The last step up to `until` whose evaluation is known: lines that the disk had not yet taken are lost with
        the machine's power."""
        steps = [line.get("step") for line in read_json_lines(self.metrics) if "top1" in line]
        return max((step for step in steps if isinstance(step, int) and step <= until), default=0)

    def drop_metrics_after(self, step: int, evaluated: int) -> None:
        """Drops lines that a run resumed at `step`, last evaluated at `evaluated`, will write again, and any line torn
        by a kill (also an event's)."""
        def stands(line: Mapping[str, Any]) -> bool:
            is_foreign = not isinstance(line.get("step", 0), int | float)
            return is_foreign or line.get("step", 0) <= (evaluated if "top1" in line else step)

        for path in (self.metrics, self.events):
            lines = read_json_lines(path)
            kept = lines if path == self.events else takewhile(stands, lines)
            write_text_synced(path, "".join(json.dumps(line) + "\n" for line in kept))


class LogFile(logging.FileHandler):
    """`train.log`; a disk that refuses a line costs that line alone."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: the default prints a traceback for every line."""


def plain(value: Any) -> Any:
    """`value` with null for numbers that are not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text_synced(path: Path, text: str) -> None:
    """Replaces a small file atomically."""
    aside = aside_of(path)
    write_synced(aside, lambda file: file.write(text.encode()))
    os.replace(aside, path)
    sync_folder(path.parent)


def aside_of(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def write_synced(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
