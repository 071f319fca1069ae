"""Run folders as they are: finished, at work, stopped, or broken off. Reads only, imports nothing heavy."""

import json
import math
import os
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from deepvit.config.compare import flat
from deepvit.config.json_lines import FOLDER, missing_cells, read_json_lines
from deepvit.errors import UserError


@dataclass(frozen=True)
class Sweep:
    """What its record tells. `key`: the same for all starts of a sweep file, or of a command without one;
    `statistics`: the contrasts of the last start, as they were given."""

    key: str
    name: str | None
    statistics: Mapping[str, Any] | None


@dataclass(frozen=True)
class Run:
    """A run folder's content. `state`: finished, running, stopped (on request), unfinished (nobody works on it, or on
    another machine), or missing (a cell that a sweep was to run), with what is known of the reason."""

    path: Path
    config: Mapping[str, Any]  # nested; `settings` has it flat
    result: Mapping[str, Any]  # metrics.json, empty unless the run is finished
    lines: list[dict[str, Any]] = field(repr=False)  # the whole ones of metrics.jsonl
    state: str
    place: str = ""  # the folder as the report names it
    sweep: Sweep | None = None

    @cached_property
    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in flat(self.config) if not name.startswith("origin")}

    def chosen(self, name: str) -> Any:
        """A setting's value (`model.depth`), or what was chosen of a group (`model/attention`)."""
        return self.settings[name] if name in self.settings else self.origin.get("choices", {}).get(name)

    @property
    def origin(self) -> Mapping[str, Any]:
        """Recipe, sweep, choices, overrides and command, as noted in the config; empty in runs of before that."""
        return self.config.get("origin") or {}

    @property
    def is_missing(self) -> bool:
        return self.state.startswith("missing")

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @cached_property
    def total(self) -> int | None:
        """Steps of the whole run; None where neither the config nor a logged epoch tells."""
        schedule = self.config.get("schedule", {})
        logged = [line for line in self.lines if line.get("epoch")]
        per_epoch = logged[-1]["step"] / logged[-1]["epoch"] if logged else None
        if (steps := schedule.get("steps")) is None:
            if per_epoch is None:
                return None
            steps = (schedule["epochs"] + (schedule.get("cooldown_epochs") or 0)) * per_epoch
        return max(math.ceil(steps - 0.2), self.step)  # logged epochs are rounded

    @property
    def progress(self) -> str:
        """How far an unfinished run is: `running, step 120/337 (36 %), top-1 so far 45.28`."""
        if self.is_missing:
            return self.state
        share = f"/{self.total} ({self.step / self.total:.0%})" if self.total else ""
        top1 = [line["top1"] for line in self.lines if "top1" in line]
        so_far = f", top-1 so far {top1[-1]:.2f}" if top1 else ""
        return f"{self.state}, step {self.step}{share}{so_far}"


def read_runs(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """All runs in and below `paths`, the missing ones of sweeps too, and a sentence for each thing left out. Raises
    UserError if a path is missing, or there is no readable run in any."""
    tops, runs, problems = [*map(Path, paths)], {}, []
    for top in tops:
        if not top.exists():
            raise UserError(f"{top} does not exist: give run folders, or a folder above them such as runs/.")
    records = _records(tops)
    sweeps = _sweeps(records)
    for top in map(Path.resolve, tops):
        for folder in _run_folders(top, problems):
            try:
                runs[folder] = replace(read_run(folder), place=_place(folder, top), sweep=sweeps.get(folder))
            except UserError as error:
                problems.append(_place(error, top))
        for cell in chain.from_iterable(map(missing_cells, records)):
            if not cell.folder.is_relative_to(top):
                continue
            reason = f" ({cell.sentence.rstrip('.')})" if cell.sentence else ""
            runs[cell.folder] = Run(cell.folder, cell.config, {}, [], f"missing{reason}", _place(cell.folder, top),
                                    sweeps.get(cell.folder))
    if all(run.is_missing for run in runs.values()):
        why = " ".join(problems) or "No config.yaml was found there or below."
        raise UserError(f"No runs to report in {', '.join(map(str, tops))}. {why}")
    return [*runs.values()], [*dict.fromkeys(problems)]


def _place(text: object, top: Path) -> str:
    """Without the folders above `top`."""
    return str(text).replace(f"{top.parent}/", "")


def without_paths(text: str) -> str:
    """`root=/mnt/me/flowers` -> `root=.../flowers`: where things lie on a machine concerns no reader."""
    return re.sub(r"(?<![\w.])/(?:[^\s/'\"=,]+/)*([^\s/'\"=,]+)", r".../\1", text)


def _records(tops: Iterable[Path]) -> list[Path]:
    """Of sweeps: there, below and above."""
    return sorted({record for top in map(Path.resolve, tops)
                   for place in (top.rglob, *(above.glob for above in top.parents))
                   for record in place(f"{FOLDER}/*.jsonl")})


def _sweeps(records: Iterable[Path]) -> dict[Path, Sweep]:
    """The sweep of each cell's folder; where it is in several, the one that was started last."""
    starts = [(line["time"], record, line) for record in records for line in read_json_lines(record) if "cells" in line]
    sweeps, folders = {}, {}
    for _, record, line in sorted(starts, key=lambda start: start[:2]):
        key = str(record.parent / (line["sweep"] or record.stem))
        sweeps[key] = Sweep(key, line["sweep"], line.get("statistics"))
        folders |= {record.parent.parent / cell["folder"]: key for cell in line["cells"] if cell.get("folder")}
    return {folder: sweeps[key] for folder, key in folders.items()}


def _run_folders(top: Path, problems: list[str]) -> list[Path]:
    def left_out(error: OSError) -> None:
        problems.append(f"{error.filename} cannot be read ({error.strerror}) and is left out.")

    return sorted(Path(folder) for folder, _, files in os.walk(top, onerror=left_out) if "config.yaml" in files)


def read_run(folder: Path) -> Run:
    """Raises UserError if the folder has no config of a run, or an unreadable one."""
    folder = Path(folder)
    config, result = _read_config(folder / "config.yaml"), _read_json(folder / "metrics.json")
    lines = [line for line in read_json_lines(folder / "metrics.jsonl") if isinstance(line.get("step"), int)]
    if result.get("finished") and isinstance(result.get("top1"), int | float):
        return Run(folder, config, result, lines, "finished")
    return Run(folder, config, {}, lines, _unfinished_state(folder))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        text = re.sub(r"\\uDC[89A-F][0-9A-F]", r"\\uFFFD", path.read_text())  # in names that are not UTF-8
        config = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); this run is left out.") from error
    try:
        if isinstance(config["model"]["depth"], int) and config["data"]["source"] and config["model"]["attention"]:
            return config
    except (KeyError, TypeError):
        pass
    raise UserError(f"{path} is not the config of a run (no model.depth, model.attention or data.source); "
                    f"it is left out.")


def _read_json(path: Path) -> dict[str, Any]:
    """A torn or missing file has nothing to say."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _unfinished_state(folder: Path) -> str:
    if _is_locked(folder / "lock"):
        return "running"
    if [line.get("event") for line in read_json_lines(folder / "events.jsonl")][-1:] == ["PREEMPTED"]:
        return "stopped"
    return f"unfinished{_elsewhere(folder / 'lock')}"


def _is_locked(lock: Path, table: Path = Path("/proc/locks")) -> bool:
    """Whether a process of this machine holds the lock, from the kernel's list: taking it would disturb the run."""
    try:
        inode, held = lock.stat().st_ino, table.read_text()
    except OSError:
        return False
    return re.search(rf"POSIX .*:{inode} ", held) is not None


def _elsewhere(lock: Path) -> str:
    """A lock of another machine cannot be seen from here: its run may be at work."""
    try:
        owner = re.search(r" on (\S+)", lock.read_text())
    except (OSError, UnicodeDecodeError):
        return ""
    return f" (last worked on by {owner[1]})" if owner and owner[1] != socket.gethostname() else ""
