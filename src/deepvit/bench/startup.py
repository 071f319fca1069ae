"""How long the commands take that should answer at once: whole processes, medians."""

import subprocess
import sys
from functools import partial
from pathlib import Path

from deepvit.bench.timing import summary, timed
from deepvit.errors import UserError

PROGRAM = Path(__file__).resolve().parents[3] / "train.py"
RUNS = 7
COMMANDS = {"train.py --help": ["--help"], "train.py --cfg job": ["model=deepvit32", "--cfg", "job"]}


def measure() -> list[dict]:
    """Rows with `case`, `name`, `ms`, `spread` (quartiles, ms); the first run of each is not counted."""
    if not PROGRAM.exists():
        raise UserError(f"There is no {PROGRAM}: run this bench from a checkout.")
    rows = []
    for name, words in {**COMMANDS, "python -c 'import deepvit'": None}.items():
        command = [sys.executable, str(PROGRAM), *words] if words else [sys.executable, "-c", "import deepvit"]
        start = partial(subprocess.run, command, check=True, capture_output=True)
        rows.append({"case": "start-up", "name": name, **summary([timed(start, "cpu") for _ in range(RUNS + 1)][1:])})
    return rows
