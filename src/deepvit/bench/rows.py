"""Measured rows: appended to a file as lines of JSON, printed as tables, compared with targets."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepvit.bench.machine import STOOD_IN
from deepvit.bench.models import OURS
from deepvit.config.records import read_json_lines
from deepvit.report.render import printed

OP, LOADER = "re-attention, ours", "deepvit, torchvision"
FROM_INDEX = "1,281,167 names from the index"
BOTH_WAYS = "forward + backward, N="
MOST_WAITED, MOST_SPREAD = 0.1, 0.05  # wall time over CPU time, less 1, and the pairs' quartiles over their median

Results = dict[str, dict[str, Any]]  # bench -> {"provenance": where and when, "rows": [...]}


def append(path: Path | None, bench: str, row: dict[str, Any]) -> None:
    """Adds `row`; `bench` may be "provenance", which holds for all rows after it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"bench": bench, **row}) + "\n")


def read(path: Path) -> Results:
    """All whole lines of the file, by bench."""
    results: Results = {}
    provenance: dict[str, Any] = {}
    for line in read_json_lines(path):
        bench = line.pop("bench")
        if bench == "provenance":
            provenance = line
        else:
            results.setdefault(bench, {"provenance": provenance, "rows": []})["rows"].append(line)
    return results


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
    instructions alone (see `machine.made_on`; a stand-in counts as what it stands in for)."""

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


EVERYWHERE = [
    Target("bytes kept for backward, likewise", "memory", "memory", OURS, "kept_ratio", 1.08),
    Target("peak memory of a train step, likewise", "memory", "memory", OURS, "ratio", 1.20),
    Target("op under bf16, relative error", "precision", "op", OP, "error", 0.005),
    Target("loader, decode + crop + flip, against timm's", "loader", "decode", LOADER, "ratio", 1.6, at_most=False),
    Target("... mean difference to PIL, of 255", "loader", "decode", LOADER, "difference", 0.05),
    Target("loader, full recipe", "loader", "full recipe", LOADER, "ratio", 1.3, at_most=False),
    Target("1.28 M images from the index, ms", "listing", "listing", FROM_INDEX, "ms", 1000),
    Target("... memory of a node with 8 ranks, MB", "listing", "listing", FROM_INDEX, "mb_node", 60),
    Target("train.py --help, ms", "startup", "start-up", "train.py --help", "ms", 1000),
    Target("train.py --cfg job, ms", "startup", "start-up", "train.py --cfg job", "ms", 1000),
]
TARGETS = {
    "cpu": [
        *(Target(f"{job} against timm's ViT", bench, job, OURS, "ratio", bound, on=on)
          for job, bench, bounds in (("train step", "train-step", (1.05, 1.10, 1.20)),
                                     ("evaluation", "eval", (1.00, 1.05, 1.20)))
          for on, bound in zip(("AVX512", "AVX2", "AVX2, no compiler"), bounds, strict=True)),
        Target("op, forward + backward, N=197, against SDPA", "attention", f"{BOTH_WAYS}197", OP, "ratio", 1.5),
        Target("op, forward + backward, N=577, against SDPA", "attention", f"{BOTH_WAYS}577", OP, "ratio", 1.5),
        Target("... N=17, width 16, one thread", "attention", f"{BOTH_WAYS}17,", OP, "ratio", 1.3),
        Target("... N=65, width 16, one thread", "attention", f"{BOTH_WAYS}65,", OP, "ratio", 1.3),
        *EVERYWHERE],
    "cuda": [
        Target("evaluation against timm's ViT", "eval", "evaluation", OURS, "ratio", 1.08),
        Target("train step against timm's ViT", "train-step", "train step", OURS, "ratio", 1.25),
        Target("... both compiled", "train-step", "compiled train step", OURS, "ratio", 1.25),
        Target("op, forward + backward, N=197, against flash SDPA", "attention", f"{BOTH_WAYS}197", OP, "ratio", 1.8),
        Target("op, forward + backward, N=577, against flash SDPA", "attention", f"{BOTH_WAYS}577", OP, "ratio", 1.8),
        Target("MiB kept of attention maps", "memory", "memory", OURS, "maps_mib", 0),
        Target("small model, images/s", "small", "", OURS, "images_per_s", 25_000, at_most=False),
        Target("... share of the time waiting for data", "small", "", OURS, "data_wait", 0.05),
        *EVERYWHERE],
}


def against_targets(results: Mapping[str, list[dict[str, Any]]], device: str) -> list[dict[str, Any]]:
    """A row for each target on which the results (bench -> rows) have a figure, and each device they were made `on`."""
    places = dict.fromkeys(row.get("on") for rows in results.values() for row in rows)
    return [{"what": target.what, "on": on, "target": f"{'<=' if target.at_most else '>='} {target.bound:g}",
             "here": row[target.field], "met": target.is_met(row)}
            for on in places for target in TARGETS[device] if (row := target.found(results, on))]
