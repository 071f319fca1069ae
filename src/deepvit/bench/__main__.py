"""`python -m deepvit.bench train-step|eval|attention|precision|memory|loader|startup|scaling|all`: tables and JSON."""

import argparse
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from deepvit.bench import attention, loader, memory, models, scaling, startup
from deepvit.bench.targets import against_targets
from deepvit.errors import UserError
from deepvit.training import device_name, versions

BENCHES: dict[str, Callable[[argparse.Namespace], list[dict]]] = {
    "train-step": lambda given: models.train_step(given.device, **_sizes(given), **_seconds(given),
                                                  compiled=given.compile),
    "eval": lambda given: models.evaluation(given.device, **_sizes(given), **_seconds(given), compiled=given.compile),
    "attention": lambda given: attention.measure(given.device, **_seconds(given)),
    "precision": lambda given: [{"case": "op under bf16 autocast at initialisation, against float64", **row}
                                for row in attention.half_precision_error(device=given.device)],
    "memory": lambda given: memory.measure(given.device, **_sizes(given)),
    "loader": lambda given: [{"case": row.pop("task"), **row}
                             for row in loader.measure(_data(given), **_seconds(given))],
    "startup": lambda given: startup.measure(given.device),
    "scaling": lambda given: scaling.measure(given.device, **_seconds(given)),
}


def _sizes(given: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(given, name) for name in ("depth", "batch") if getattr(given, name) is not None}


def _seconds(given: argparse.Namespace) -> dict[str, float]:
    return {} if given.seconds is None else {"seconds": given.seconds}


def _data(given: argparse.Namespace) -> str:
    if given.data is None:
        raise UserError("The loader is measured on your JPEGs: give --data FOLDER.")
    return given.data


def provenance(device: str) -> dict[str, Any]:
    """Where and when: without it a time says nothing."""
    return {"date": time.strftime("%Y-%m-%d %H:%M"), "machine": platform.machine(), "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0],
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
    parser = argparse.ArgumentParser(prog="python -m deepvit.bench", description=__doc__)
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
    logging.basicConfig(level=logging.WARNING)
    results: dict[str, Any] = {"provenance": provenance(given.device)}
    print(json.dumps(results["provenance"]), flush=True)
    try:
        for name in chosen:
            results[name] = BENCHES[name](given)
            for case in dict.fromkeys(row["case"] for row in results[name]):
                print(f"\n{case}\n{table([row for row in results[name] if row['case'] == case])}", flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    judged = against_targets(results, given.device)
    if judged:
        print(f"\nagainst the targets\n{table(judged)}")
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
