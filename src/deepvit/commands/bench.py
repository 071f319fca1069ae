"""`deepvit bench train-step|eval|attention|memory|...|all`: speed and memory against peers, as tables and JSON."""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from deepvit.bench import rows
from deepvit.bench.apart import apart
from deepvit.bench.benches import BENCHES, all_of, measure
from deepvit.bench.targets import against_targets
from deepvit.config.provenance import versions
from deepvit.engine.device import device_name, usable_cores
from deepvit.errors import DONE, Failure


def provenance(device: str) -> dict[str, Any]:
    """Where and when: without it a time says nothing."""
    return {"date": time.strftime("%Y-%m-%d %H:%M"), "machine": platform.machine(), "processor": _processor(),
            "cores": usable_cores(), "load": os.getloadavg()[0],
            "device": device_name(torch.device(device)), "driver": _driver(), "triton": _triton(), **versions()}


def _driver() -> str | None:
    """NVIDIA's, where there is one."""
    try:
        asked = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                               capture_output=True, text=True, check=True)
        return asked.stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _triton() -> str | None:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="deepvit bench", description=__doc__)
    parser.add_argument("benches", nargs="+", choices=[*BENCHES, "all"], metavar="BENCH",
                        help=f"{', '.join(BENCHES)}, or all (without forecast; loader with --data, imagenet on a GPU)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="to spend on each bench (attention, scaling: on each case)")
    parser.add_argument("--depth", type=int, help="blocks of the models (default 32)")
    parser.add_argument("--batch", type=int, help="images (default: CPU 4, memory 8, small 32; GPU 256, small 512)")
    parser.add_argument("--data", help="a folder of JPEGs, for the loader")
    parser.add_argument("--cifar10", help="its folder, for the small model (default: the built-in digits)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models")
    parser.add_argument("--json", type=Path, help="add the rows to this file too, a line for each once it is known")
    given = parser.parse_args(arguments)
    chosen = all_of(given) if "all" in given.benches else given.benches
    where = provenance(given.device)
    rows.append(given.json, "provenance", where)
    print(json.dumps(where), flush=True)
    results = {}
    for name in chosen:
        try:
            results[name] = measure(name, given) if len(chosen) == 1 else apart(measure, name, given)
        except BrokenProcessPool:  # killed, most often for its memory; its rows up to then are in the file
            results[name] = [{"case": name, "name": "all of it", "failed": "its process was killed"}]
            rows.append(given.json, name, results[name][0])
        print(f"\n{rows.tables(results[name])}", flush=True)
    judged = against_targets(results, given.device)
    if judged:
        print(f"\nagainst the targets\n\n{rows.table(judged)}")
    failed = [row for found in results.values() for row in found if "failed" in row]
    if failed:
        raise Failure(f"{len(failed)} rows have no figures, the first of them because of: {failed[0]['failed']}.")
    return DONE
