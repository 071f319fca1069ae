"""Measured rows: appended to a file as lines of JSON, printed as tables, compared with targets."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deepvit.bench.machine import STOOD_IN
from deepvit.report.render import printed

MOST_WAITED, MOST_SPREAD = 0.1, 0.05  # wall time over CPU time, less 1, and the pairs' quartiles over their median


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


_GIVEN = yaml.safe_load(Path(__file__).with_name("targets.yaml").read_text())
TARGETS = {device: [Target(**one) for one in _GIVEN[device] + _GIVEN["everywhere"]] for device in ("cpu", "cuda")}


def against_targets(results: Mapping[str, list[dict[str, Any]]], device: str) -> list[dict[str, Any]]:
    """A row for each target on which the results (bench -> rows) have a figure, and each device they were made `on`."""
    places = dict.fromkeys(row.get("on") for rows in results.values() for row in rows)
    return [{"what": target.what, "on": on, "target": f"{'<=' if target.at_most else '>='} {target.bound:g}",
             "here": row[target.field], "met": target.is_met(row)}
            for on in places for target in TARGETS[device] if (row := target.found(results, on))]
