"""A training run as a contestant."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepvit.config.json_lines import read_json_lines
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.run.train import train


def alone(device: str) -> Ranks:
    """One rank, on the first device of its kind."""
    return Ranks(0, 1, torch.device(device, 0 if device == "cuda" else None))


def trained(config: Mapping[str, Any], ranks: Ranks) -> list[dict[str, Any]]:
    """What the run of `config` logged."""
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder), ranks, StopRequest())
        return read_json_lines(Path(folder) / "metrics.jsonl")
