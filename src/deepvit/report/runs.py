"""Run folders as they are: finished, running, stopped, or broken off. Reads only, imports nothing heavy."""

import json
import math
import os
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from deepvit.config.compare import flat
from deepvit.config.records import FOLDER, missing_cells, read_json_lines
from deepvit.errors import UserError


@dataclass(frozen=True)
class Sweep:
    """`key`: the same for all starts of a sweep file, or of a command; `statistics`: its contrasts, as given last."""

    key: str
    name: str | None
    statistics: Mapping[str, Any] | None


@dataclass(frozen=True)
class Run:
    """A run folder's content. `state`: finished, running, stopped (on request), unfinished (nobody works on it, or on
    another machine), or missing (a sweep was to run it), with what is known of the reason."""

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

    @property
    def origin(self) -> Mapping[str, Any]:
        """Recipe, sweep, choices, overrides and command, as noted in the config; empty in runs that predate it."""
        return self.config.get("origin") or {}

    def chosen(self, name: str) -> Any:
        """A setting's value (`model.depth`), or what was chosen of a group (`model/attention`)."""
        return self.settings[name] if name in self.settings else self.origin.get("choices", {}).get(name)

    @property
    def seed(self) -> int:
        return self.config.get("seed", 0)

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
        steps, logged = schedule.get("steps"), [line for line in self.lines if line.get("epoch")]
        if steps is None and logged:
            epochs = schedule["epochs"] + (schedule.get("cooldown_epochs") or 0)
            steps = epochs * logged[-1]["step"] / logged[-1]["epoch"]
        return None if steps is None else max(math.ceil(steps - 0.2), self.step)  # logged epochs are rounded

    @property
    def progress(self) -> str:
        """How far an unfinished run is: `running, step 120/337 (36 %), top-1 so far 45.28`."""
        if self.is_missing:
            return self.state
        share = f"/{self.total} ({self.step / self.total:.0%})" if self.total else ""
        top1 = [f", top-1 so far {line['top1']:.2f}" for line in self.lines if "top1" in line]
        return f"{self.state}, step {self.step}{share}{''.join(top1[-1:])}"


def read_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """All runs in and below `paths`, those that a sweep lacks too, and a sentence for each thing left out. Raises
    UserError if a path is missing, or there is no readable run in any."""
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: give run folders, or a folder above them such as runs/.")
    tops, runs, problems = [*map(Path.resolve, paths)], {}, []
    records = sorted({record for top in tops for place in (top.rglob, *(above.glob for above in top.parents))
                      for record in place(f"{FOLDER}/*.jsonl")})
    sweeps = _sweeps(records)
    for top in tops:
        for folder in _run_folders(top, problems):
            try:
                runs[folder] = replace(read_run(folder), place=_place(folder, top), sweep=sweeps.get(folder))
            except UserError as error:
                problems.append(_place(error, top))
        for folder, config, sentence in (cell for record in records for cell in missing_cells(record)):
            if folder.is_relative_to(top):
                reason = f" ({sentence.rstrip('.')})" if sentence else ""
                runs[folder] = Run(folder, config, {}, [], f"missing{reason}", _place(folder, top), sweeps.get(folder))
    if all(run.is_missing for run in runs.values()):
        why = " ".join(problems) or "No config.yaml was found there or below."
        raise UserError(f"No runs to report in {', '.join(map(str, paths))}. {why}")
    return [*runs.values()], [*dict.fromkeys(problems)]


def _place(text: object, top: Path) -> str:
    """Without the folders above `top`."""
    return str(text).replace(f"{top.parent}/", "")


def without_paths(text: str) -> str:
    """`root=/mnt/me/flowers` -> `root=.../flowers`: where things lie on a machine concerns no reader."""
    return re.sub(r"(?<![\w.])/(?:[^\s/'\"=,]+/)*([^\s/'\"=,]+)", r".../\1", text)


def _sweeps(records: Iterable[Path]) -> dict[Path, Sweep]:
    """The sweep of each cell's folder; of several, the one that was started last."""
    starts = [(line["time"], record, line) for record in records for line in read_json_lines(record) if "cells" in line]
    sweeps, folders = {}, {}
    for _, record, line in sorted(starts, key=lambda start: start[:2]):
        key = str(record.parent / (line["sweep"] or record.stem))
        sweeps[key] = Sweep(key, line["sweep"], line.get("statistics"))
        folders |= {record.parent.parent / cell["folder"]: key for cell in line["cells"] if cell.get("folder")}
    return {folder: sweeps[key] for folder, key in folders.items()}


def _run_folders(top: Path, problems: list[str]) -> list[Path]:
    walk = os.walk(top, onerror=lambda error: problems.append(
        f"{error.filename} cannot be read ({error.strerror}) and is left out."))
    return sorted(Path(folder) for folder, _, files in walk if "config.yaml" in files)


def read_run(folder: Path) -> Run:
    """Raises UserError if the folder has no config of a run, or an unreadable one."""
    config, result = _read_config(folder / "config.yaml"), _read_result(folder / "metrics.json")
    lines = [line for line in read_json_lines(folder / "metrics.jsonl") if isinstance(line.get("step"), int)]
    return Run(folder, config, result, lines, "finished" if result else _unfinished_state(folder))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        text = re.sub(r"\\uDC[89A-F][0-9A-F]", r"\\uFFFD", path.read_text())  # in names that are not UTF-8
        config = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); this run is left out.") from error
    with suppress(KeyError, TypeError):
        if isinstance(config["model"]["depth"], int) and config["data"]["source"] and config["model"]["attention"]:
            return config
    raise UserError(f"{path} is not the config of a run (no model.depth, model.attention or data.source); "
                    f"it is left out.")


def _read_result(path: Path) -> dict[str, Any]:
    """A finished run's; empty where the file is torn, missing or of an unfinished run."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.get("finished") and isinstance(content.get("top1"), int | float):
            return content
    return {}


def _unfinished_state(folder: Path) -> str:
    if _is_locked(folder / "lock"):
        return "running"
    if [line.get("event") for line in read_json_lines(folder / "events.jsonl")][-1:] == ["PREEMPTED"]:
        return "stopped"
    with suppress(OSError, UnicodeDecodeError):
        owner = re.search(r" on (\S+)", (folder / "lock").read_text())
        if owner and owner[1] != socket.gethostname():  # its lock cannot be seen here: it may be running
            return f"unfinished (last worked on by {owner[1]})"
    return "unfinished"


def _is_locked(lock: Path) -> bool:
    """Whether a process of this machine holds the lock, from the kernel's list: taking it would disturb the run."""
    with suppress(OSError):
        return re.search(rf"POSIX .*:{lock.stat().st_ino} ", Path("/proc/locks").read_text()) is not None
    return False
