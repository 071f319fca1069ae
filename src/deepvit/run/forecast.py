"""What a run would take: everything is built and three updates are made, nothing is written."""

import logging
import resource
import time
from collections.abc import Mapping
from typing import Any

import torch

from deepvit.engine.device import prepare_device
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.models.cost import count_flops, count_parameters
from deepvit.run import build
from deepvit.run.result import summary_of

log = logging.getLogger(__name__)


def forecast(config: Mapping[str, Any], ranks: Ranks, stop: StopRequest) -> dict[str, float] | None:
    """Says and returns what the run would take; None: asked to stop."""
    settings = build.read_settings(config)
    prepare_device(build.precision(settings.precision), ranks, settings.engine.threads)
    build.check(settings, ranks)
    built = build.build(settings, ranks)
    seconds = []
    for batches in built.make_batches(0, 3):
        start = time.perf_counter()
        _, update = built.stepper.update(built.state, batches, stop)
        if update is None or ranks.any_asked_to_stop(bool(stop)):
            return None
        float(update.loss)  # waits for the device
        seconds.append(time.perf_counter() - start)
    step = min(seconds[1:])  # the first warms up
    hours = step * built.plan.total / 3600
    found = {"params": count_parameters(built.model), "flops": count_flops(built.model),
             "memory_mib": _peak_memory_mib(ranks.device), "steps": built.plan.total, "step_s": step,
             "hours": hours, "device_hours": hours * ranks.world}
    if ranks.is_main:
        log.info("%s", summary_of(built))
        log.info("Dry run: %.3g GFLOP an image forward, %.0f MiB at most so far, %.3g s a step, so %.3g h "
                 "(%.3g device-hours), evaluation not counted.", found["flops"] / 1e9, found["memory_mib"], step,
                 hours, found["device_hours"])
    return found


def _peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
