"""What a rank is asked to do; module-level functions, so that they can be started in other processes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.launch import DONE, STOPPED, Outcome


def train_job(config: Mapping[str, Any], folder: Path, ranks: Ranks, stop: StopRequest) -> Outcome:
    from deepvit import training
    if config["dry"]:
        forecast = training.dry_run(config, ranks, stop)
        return Outcome(STOPPED if forecast is None else DONE, value=forecast)
    return Outcome(DONE if training.train(config, folder, ranks, stop) else STOPPED)


def eval_job(config: Mapping[str, Any], folder: Path, ranks: Ranks, stop: StopRequest) -> Outcome:
    from deepvit import evaluation
    results = evaluation.evaluate_all(config, ranks, stop)
    return Outcome(STOPPED if results is None else DONE, "" if results else "Stopped on request.", results)
