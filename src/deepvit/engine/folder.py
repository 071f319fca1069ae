"""A run folder: one owner at a time, results as JSON lines that survive a kill, and a record of what happened."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from deepvit.engine.checkpoint import write_text_synced
from deepvit.errors import UserError


class RunFolder:
    """The paths of a run and its append-only files. Rank 0 owns it; the others only read.

    The lock is the kernel's (`flock`): it ends with its process, however that dies, so no lock is ever stale.
    """

    OWN = ("config.yaml", "metrics.jsonl", "metrics.json", "events.jsonl", "train.log")

    def __init__(self, path: Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.last, self.previous = self.checkpoints / "last.pt", self.checkpoints / "previous.pt"
        self.best = self.checkpoints / "best.pt"
        self.metrics, self.events = self.path / "metrics.jsonl", self.path / "events.jsonl"
        self.result, self.config = self.path / "metrics.json", self.path / "config.yaml"
        self._lock: IO[str] | None = None

    def claim(self) -> None:
        """Creates the folder, proves that it can be written, and takes its lock.

        Raises:
            UserError: not writable, or another process works in it (which is named).
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("a+")
        except OSError as error:
            raise UserError(f"The run folder {self.path} cannot be written ({error.strerror}): "
                            f"choose another with hydra.run.dir=...") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            raise UserError(f"The run folder {self.path} is in use by {owner}: wait for it or stop it.") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock
        for partial in self.path.rglob("*.tmp"):
            partial.unlink()

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
        write_text_synced(self.result, json.dumps(result, indent=1) + "\n")

    def log_metrics(self, line: dict[str, Any]) -> None:
        _append(self.metrics, line)

    def log_event(self, event: str, **details: Any) -> None:
        _append(self.events, {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **details})

    def drop_metrics_after(self, step: int) -> None:
        """Forgets lines that the continued run will write again, and a line that a kill tore."""
        kept = [line for line in read_json_lines(self.metrics) if line["step"] <= step]
        write_text_synced(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))


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


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
