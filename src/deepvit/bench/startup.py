"""How long the commands take that should answer at once: whole processes, medians."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from deepvit.errors import UserError

PROGRAM = Path(__file__).resolve().parents[3] / "train.py"
COMMANDS = {"train.py --help": ["--help"], "train.py --cfg job": ["model=deepvit32", "--cfg", "job"]}


def measure(device: str = "cpu", *, runs: int = 7) -> list[dict]:
    """Rows with `case`, `name`, `ms`, `spread` (quartiles, ms); the first run of each is not counted."""
    if not PROGRAM.exists():
        raise UserError(f"There is no {PROGRAM}: run this bench from a checkout.")
    rows = []
    for name, words in {**COMMANDS, "python -c 'import deepvit'": None}.items():
        command = [sys.executable, str(PROGRAM), *words] if words else [sys.executable, "-c", "import deepvit"]
        times = [_seconds(command) for _ in range(runs + 1)][1:]
        low, middle, high = statistics.quantiles(times, n=4)
        rows.append({"case": "start-up", "name": name, "ms": 1e3 * middle, "spread": (1e3 * low, 1e3 * high)})
    return rows


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start
