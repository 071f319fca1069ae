"""Files of JSON lines, which are appended to while others read them; one is a sweep's record: the cells that it was to
run, and how each ended, whatever process ran it."""

import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepvit.config.compare import nested

FOLDER = "sweeps"  # of records, in hydra.sweep.dir


def written_for_us(path: Path) -> bool:
    """Whether Hydra wrote this multirun.yaml or hydra.yaml for deepvit."""
    with suppress(OSError):
        return re.search(r"deepvit\.commands\.sweep|\$\{run_folder:", path.read_text(errors="replace")) is not None
    return False


def missing(path: Path) -> list[Path]:
    """What has to be made before `path` exists: itself, then the folders above it."""
    return [one for one in (path, *path.parents) if not one.exists()]


def remove_empty(paths: Sequence[Path]) -> None:
    """Removes files, and folders up to the first that is not empty."""
    with suppress(OSError):
        for path in paths:
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """OSError where nothing could be written to `folder`; leaves nothing behind."""
    made = missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        remove_empty(made)


def read_json_lines(path: Path, last: int = 0) -> list[dict[str, Any]]:
    """The whole lines of a `.jsonl` file, or of its `last` bytes, without torn or foreign ones; none if unreadable."""
    try:
        with path.open("rb") as file:
            file.seek(-min(last, os.fstat(file.fileno()).st_size), os.SEEK_END if last else os.SEEK_SET)
            texts = file.read().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    lines = []
    for text in texts.split("\n"):
        with suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


@dataclass(frozen=True)
class SweepRecord:
    """`<hydra.sweep.dir>/sweeps/<name>.jsonl`: a line of each start (`session`) with its cells, and of each outcome."""

    path: Path
    session: str

    def open(self, command: str, sweep: str | None, cells: Sequence[Mapping[str, Any]],
             shared: Mapping[str, Any], statistics: Mapping[str, Any] | None = None) -> None:
        """The first line. `cells` have `overrides`, `folder` and (flat) `settings`; none if the sweeper decides as it
        goes. `shared`: the settings that all have. `statistics`: see `deepvit.report.statistics`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._append({"command": command, "sweep": sweep, "shared": shared, "cells": cells, "statistics": statistics})

    def add(self, number: int, overrides: Sequence[str], code: int, sentence: str, folder: Path, value: Any) -> None:
        """How cell `number` ended: exit code, message, folder, and what it found."""
        top, place = self.path.parent.parent.resolve(), folder.resolve()
        self._append({"cell": number, "overrides": list(overrides), "code": code, "sentence": sentence,
                      "folder": str(place.relative_to(top) if place.is_relative_to(top) else place), "value": value})

    def outcomes(self) -> list[dict[str, Any]]:
        """Of this session's cells, in their order."""
        lines = [line for line in read_json_lines(self.path) if line.get("session") == self.session and "cell" in line]
        return list({line["cell"]: line for line in sorted(lines, key=lambda line: line["cell"])}.values())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        with suppress(OSError):
            self.path.parent.rmdir()

    def _append(self, line: Mapping[str, Any]) -> None:
        text = json.dumps({"session": self.session, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **line}) + "\n"
        with self.path.open("ab", buffering=0) as file:
            fcntl.lockf(file, fcntl.LOCK_EX)  # a line stays whole, whoever else writes
            file.write(text.encode())
            os.fsync(file.fileno())


def missing_cells(record: Path) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """Folder and config of each cell of the sweep's last start that has no run, and why, where it failed."""
    top, lines = record.parent.parent, read_json_lines(record)
    started = [line for line in lines if "cells" in line]
    outcomes = {tuple(line["overrides"]): line for line in lines if "cell" in line}
    for cell in started[-1]["cells"] if started else ():
        outcome = outcomes.get(tuple(cell["overrides"]), {})
        places = [top / folder for folder in (cell.get("folder"), outcome.get("folder")) if folder]
        if places and not any((place / "config.yaml").exists() for place in places):
            config = nested({**started[-1]["shared"], **cell["settings"], "origin.overrides": cell["overrides"]})
            yield places[0], config, outcome.get("sentence", "")
