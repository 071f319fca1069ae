#!/usr/bin/env python3
"""Trains a Vision Transformer: `python train.py model=deepvit32`. More: `python train.py --help`."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
try:
    import hydra  # noqa: F401
except ModuleNotFoundError:  # started outside .venv: go on in it
    python = HERE / ".venv" / "bin" / "python"
    if not python.exists() or Path(sys.executable) == python:
        sys.exit("hydra is not installed in this python: run `make install` first.")
    os.execv(python, [str(python), *sys.argv])

from deepvit.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
