"""`deepvit bench train-step|eval|attention|precision|memory|loader|listing|startup|scaling|all`: tables and JSON."""

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deepvit.bench.benches import BENCHES, measure, measure_apart
from deepvit.bench.targets import against_targets
from deepvit.config.provenance import versions
from deepvit.engine.device import device_name, usable_cores
from deepvit.errors import DONE


def provenance(device: str) -> dict[str, Any]:
    """Where and when: without it a time says nothing."""
    return {"date": time.strftime("%Y-%m-%d %H:%M"), "machine": platform.machine(), "processor": _processor(),
            "cores": usable_cores(), "load": os.getloadavg()[0],
            "device": device_name(torch.device(device)), **versions()}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def table(rows: list[dict]) -> str:
    """Rows as a markdown table, the columns in the order they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "case"))
    cells = [columns, *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (tuple, list)):
        return " to ".join(_cell(one) for one in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="deepvit bench", description=__doc__)
    parser.add_argument("benches", nargs="+", choices=[*BENCHES, "all"], metavar="BENCH",
                        help=f"{', '.join(BENCHES)}, or all (loader only with --data)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="to spend on each bench (attention, scaling: on each case)")
    parser.add_argument("--depth", type=int, help="blocks of the models (default 32)")
    parser.add_argument("--batch", type=int, help="pictures (default: CPU 4, memory 8; GPU 256)")
    parser.add_argument("--data", help="a folder of JPEGs, for the loader")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    given = parser.parse_args(arguments)
    chosen = [name for name in BENCHES if name != "loader" or given.data] if "all" in given.benches else given.benches
    results: dict[str, Any] = {"provenance": provenance(given.device)}
    print(json.dumps(results["provenance"]), flush=True)
    run = measure if len(chosen) == 1 else measure_apart
    for name in chosen:
        results[name] = run(name, given)
        for case in dict.fromkeys(row["case"] for row in results[name]):
            print(f"\n{case}\n{table([row for row in results[name] if row['case'] == case])}", flush=True)
    judged = against_targets(results, given.device)
    if judged:
        print(f"\nagainst the targets\n{table(judged)}")
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    return DONE
