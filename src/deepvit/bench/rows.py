"""Measured rows: the machine they were made on, without which a time means nothing; their file of JSON lines, their
tables, and the targets that they are compared with."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from deepvit.config.provenance import versions
from deepvit.engine.device import device_name, usable_cores
from deepvit.errors import UserError
from deepvit.ops import native
from deepvit.report.render import printed

PROCESSOR = "/proc/cpuinfo"
STOOD_IN = " (stand-in)"
HELD_BACK = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
MOST_WAITED, MOST_SPREAD = 0.1, 0.05  # wall time over CPU time, less 1, and the pairs' quartiles over their median


def made_on(device: str) -> str:
    """The card, or the instruction set as torch names it; `AVX2 (stand-in)` on a processor that has AVX-512, which is
    not the same as `AVX2`. UserError if torch alone is held back to AVX2."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = torch.backends.cpu.get_cpu_capability()
    if name == "AVX2" and _found_in(PROCESSOR, r"^flags\s*:.* (avx512f) "):
        missing = [f"{key}={value}" for key, value in HELD_BACK.items() if os.environ.get(key) != value]
        if missing:
            raise UserError(f"ATEN_CPU_CAPABILITY holds torch back to AVX2, but not the other libraries: also set "
                            f"{' '.join(missing)}.")
        name += STOOD_IN
    return name if native.instructions() else f"{name}, no compiler"


def provenance(device: str) -> dict[str, Any]:
    """Where and when; on a CPU also its caches and the `instructions` of torch, its matrix library and our kernel."""
    on_cpu = {} if device != "cpu" else {
        "instructions": {"torch": torch.backends.cpu.get_cpu_capability(), "matrices": _matrix_library(),
                         "kernel": native.instructions() or native.load()[1]}, "caches": _caches()}
    return {"date": time.strftime("%Y-%m-%d %H:%M"), "machine": platform.machine(),
            "processor": _found_in(PROCESSOR, r"^model name\s*: (.*)$") or platform.processor(),
            "cores": usable_cores(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
            "device": device_name(torch.device(device)), **on_cpu,
            "driver": _found_in("/proc/driver/nvidia/version", r"^NVRM version: .*?\s(\d+\.[\d.]+)\s"),
            "triton": next((found.version for found in metadata.distributions(name="triton")), None), **versions()}


def _found_in(path: str | Path, pattern: str) -> str | None:
    with suppress(OSError):
        if found := re.search(pattern, Path(path).read_text(), re.MULTILINE):
            return found[1]
    return None


@cache
def _matrix_library() -> str:
    """MKL with its instructions, which on an AMD processor it does not name."""
    program = [sys.executable, "-c", "import torch; torch.ones(2, 2) @ torch.ones(2, 2)"]
    output = subprocess.run(program, env={**os.environ, "MKL_VERBOSE": "1"}, capture_output=True, text=True).stdout
    found = re.search("MKL_VERBOSE (.*?), ", output)
    return found[1] if found else "not MKL"


def _caches() -> dict[str, str]:
    """Sizes by level and type: L1 Data, L1 Instruction, L2 Unified ..."""
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    read = ([_found_in(cache / key, "(.*)") for key in ("level", "type", "size")] for cache in caches)
    return {f"L{level} {kind}": size for level, kind, size in read}


def append(path: Path | None, bench: str, row: dict[str, Any]) -> None:
    """Adds `row`; `bench` may be "provenance", which holds for all rows after it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"bench": bench, **row}) + "\n")


def table(rows: list[dict]) -> str:
    """Rows as a markdown table, without their case, the columns in the order they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "case"))
    return printed(columns, [[_cell(row.get(name)) for name in columns] for row in rows], markdown=True)


def tables(rows: list[dict]) -> str:
    """A table for each case, under its name."""
    cases = dict.fromkeys(row["case"] for row in rows)
    return "\n\n".join(f"{case}\n\n{table([row for row in rows if row['case'] == case])}" for case in cases)


def _cell(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " to ".join(map(_cell, value))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Target:
    """A bound on one `field` of the row `name` of a bench's cases that begin with `case`; with `on` for those
    instructions alone (see `made_on`; a stand-in counts as what it stands in for)."""

    what: str
    bench: str
    case: str
    name: str
    field: str
    bound: float
    at_most: bool = True
    on: str | None = None

    def found(self, results: Mapping[str, list[dict[str, Any]]], made_on: str | None) -> dict[str, Any] | None:
        """The last such row made there: a repeated measurement replaces the first."""
        if self.on and self.on != (made_on or "").replace(STOOD_IN, ""):
            return None
        return next((row for row in reversed(results.get(self.bench) or []) if row.get("on") == made_on
                     and row["case"].startswith(self.case) and row["name"] == self.name and self.field in row), None)

    def is_met(self, row: Mapping[str, Any]) -> str:
        """yes or no; a ratio of times taken beside other programs is undecided."""
        if self.field == "ratio" and "pairs" in row:
            waited, spread = row["waited"], (row["pairs"][1] - row["pairs"][0]) / row["ratio"]
            if waited >= MOST_WAITED or spread >= MOST_SPREAD:
                return f"undecided: waited {waited:.0%}, pairs spread by {spread:.0%}"
        met = row[self.field] <= self.bound if self.at_most else row[self.field] >= self.bound
        return "yes" if met else "no"


_GIVEN = yaml.safe_load(Path(__file__).with_name("targets.yaml").read_text())
TARGETS = {device: [Target(**one) for one in _GIVEN[device] + _GIVEN["everywhere"]] for device in ("cpu", "cuda")}


def against_targets(results: Mapping[str, list[dict[str, Any]]], device: str) -> list[dict[str, Any]]:
    """A row for each target on which the results (bench -> rows) have a figure, and each device they were made `on`."""
    places = dict.fromkeys(row.get("on") for rows in results.values() for row in rows)
    return [{"what": target.what, "on": on, "target": f"{'<=' if target.at_most else '>='} {target.bound:g}",
             "here": row[target.field], "met": target.is_met(row)}
            for on in places for target in TARGETS[device] if (row := target.found(results, on))]
