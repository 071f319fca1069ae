"""Rows of figures as tables, and in a file that gets a line of JSON for each as soon as it is known."""

import json
from pathlib import Path
from typing import Any

from deepvit.config.json_lines import read_json_lines
from deepvit.report.render import printed

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
