"""A run folder: one owner at a time, results as JSON lines that survive a kill, and a record of what happened."""

import errno
import fcntl
import json
import logging
import math
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, ClassVar

from deepvit.engine.checkpoint import write_text_synced
from deepvit.engine.ranks import Ranks
from deepvit.errors import UserError

log = logging.getLogger(__name__)


class RunFolder:
    """The paths of a run and its append-only files. Rank 0 owns it; the others only read.

    The lock is the kernel's (`lockf`): it ends with its process, however that dies, so no lock is ever stale. (Not
    `flock`, which the processes that load pictures would inherit and hold for seconds after a SIGKILL.)
    """

    _claimed: ClassVar[set[Path]] = set()  # by this process, to which its own lockf gives way

    OWN = ("config.yaml", "metrics.jsonl", "metrics.json", "events.jsonl", "train.log")

    def __init__(self, path: Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.last, self.previous = self.checkpoints / "last.pt", self.checkpoints / "previous.pt"
        self.best, self.nonfinite = self.checkpoints / "best.pt", self.checkpoints / "nonfinite.pt"
        self.metrics, self.events = self.path / "metrics.jsonl", self.path / "events.jsonl"
        self.result, self.config = self.path / "metrics.json", self.path / "config.yaml"
        self._lock: IO[str] | None = None
        self._waiting: dict[Path, list[str]] = {}

    def claim(self) -> None:
        """Creates the folder, proves that it can be written, and takes its lock.

        Raises:
            UserError: not writable, or another process works in it (which is named).
        """
        if self.path.resolve() in self._claimed:
            raise UserError(f"The run folder {self.path} is in use by this very process.")
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("a+")
            self._prove_writable()
        except OSError as error:
            raise UserError(f"The run folder {self.path} cannot be written ({error.strerror}): "
                            f"choose another with hydra.run.dir=...") from error
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
        self._lock = lock
        self._claimed.add(self.path.resolve())
        for partial in self.path.rglob("*.tmp"):
            partial.unlink()

    @contextmanager
    def claimed(self, ranks: Ranks, clear: bool = False) -> Iterator[None]:
        """Rank 0 owns the folder, on behalf of all; `clear` forgets an earlier run."""
        with ranks.together():
            if ranks.is_main:
                self.claim()
                if clear:
                    self.clear()
        try:
            yield
        finally:
            self.release()

    def _prove_writable(self) -> None:
        """A full or read-only disk shows itself now, not after the first epoch."""
        for folder in (self.path, self.checkpoints):
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(4096))

    def release(self) -> None:
        """Gives the lock back; a folder in which nothing was begun is left as it was found."""
        if self._lock is None:
            return
        if not self.config.exists():
            (self.path / "lock").unlink(missing_ok=True)
            with suppress(OSError):
                self.checkpoints.rmdir()
        self._lock.close()
        self._lock = None
        self._claimed.discard(self.path.resolve())

    def clear(self) -> None:
        """Forgets an earlier run (`fresh=true`): only files that a run writes."""
        for path in (*self.checkpoints.glob("*.pt*"), *(self.path / name for name in self.OWN),
                     *self.path.glob("events.out.tfevents.*")):
            path.unlink(missing_ok=True)

    def is_finished(self) -> bool:
        return bool(self.read_result().get("finished"))

    def read_result(self) -> dict[str, Any]:
        """`metrics.json`, or an empty dict where there is none (or a torn one of a foreign writer)."""
        try:
            return json.loads(self.result.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def write_result(self, result: dict[str, Any]) -> None:
        write_text_synced(self.result, json.dumps(plain(result), indent=1, allow_nan=False) + "\n")

    def log_metrics(self, line: dict[str, Any]) -> None:
        self._append(self.metrics, line)

    def log_event(self, event: str, **details: Any) -> None:
        self._append(self.events, {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **details})

    def _append(self, path: Path, line: dict[str, Any]) -> None:
        """Adds a line now or, where the disk refuses, together with the next one: none is lost while we live."""
        waiting = self._waiting.setdefault(path, [])
        waiting.append(json.dumps(plain(line), allow_nan=False) + "\n")
        try:
            _append_whole(path, "".join(waiting).encode())
        except OSError as error:
            log.warning("%s cannot be written (%s); its lines are kept in memory and tried again.", path,
                        error.strerror)
            return
        waiting.clear()

    def run_id(self) -> str:
        """What viewers know the run by: the same however often it is resumed, another after `fresh=true`."""
        return next((event["run_id"] for event in read_json_lines(self.events) if "run_id" in event),
                    uuid.uuid4().hex[:8])

    def drop_metrics_after(self, step: int) -> None:
        """Forgets lines that the continued run will write again, and a line that a kill tore (also an event's)."""
        for path in (self.metrics, self.events):
            kept = [line for line in read_json_lines(path) if path == self.events or line["step"] <= step]
            write_text_synced(path, "".join(json.dumps(line) + "\n" for line in kept))


class LogFile(logging.FileHandler):
    """`train.log`; a disk that refuses a line costs that line alone."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: the default prints a traceback for every line."""


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a `.jsonl` file; a torn last line is passed over, a missing file has none."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def plain(value: Any) -> Any:
    """`value` with null for numbers that are not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append_whole(path: Path, text: bytes) -> None:
    """All of `text` or, when the disk refuses, nothing of it."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(handle).st_size
        if (written := os.write(handle, text)) < len(text):
            os.ftruncate(handle, size)
            raise OSError(errno.ENOSPC, f"{written} of {len(text)} bytes were taken")
    finally:
        os.close(handle)
