"""What a run would take (`dry=true`): everything is built, a few updates and one batch of the first evaluation are run,
nothing is written."""

import logging
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from deepvit.engine.device import peak_bytes, prepare_device, reset_peak
from deepvit.engine.evaluate import scores
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.models.cost import count_flops, count_parameters
from deepvit.run import build
from deepvit.run.build import Built
from deepvit.run.launch import Stopped
from deepvit.run.measures import summary_of
from deepvit.run.resume import with_model_of_init

WARM_UP, MIN_STEPS, MAX_STEPS, ENOUGH_S = 1, 3, 50, 2.0  # not timed; timed: at least, at most, until so long
FEW_PARTS = 4  # micro-batches

log = logging.getLogger(__name__)


def forecast(config: Mapping[str, Any], ranks: Ranks, stop: StopRequest) -> dict[str, float]:
    """Says and returns what the run would take, memory beyond what the process had before."""
    with ranks.sync_errors():
        settings = build.read_settings(with_model_of_init(config))
    prepare_device(build.precision(settings.precision, ranks.device), ranks, settings.engine.threads,
                   settings.engine.deterministic)
    build.check(settings, ranks)
    before = reset_peak(ranks.device)
    built = build.build(settings, ranks)
    if ranks.is_main:
        log.info("%s", summary_of(built))
        log.info("Timing a few steps.")
    seconds = list(_steps(built, stop))
    if not seconds or ranks.any_asked_to_stop(bool(stop)):
        raise Stopped
    with closing(build.eval_batches(settings.data, built.splits.val, ranks)()) as batches, torch.no_grad():
        # may need more memory than training does
        scores(built.state.evaluated_model.eval(), next(batches), built.prepare, ranks, built.stepper.precision, [])
    step = statistics.median(seconds[WARM_UP:] or seconds)
    hours = step * built.plan.total / 3600
    found = {"params": count_parameters(built.model), "flops": count_flops(built.model),
             "memory_mib": (peak_bytes(ranks.device) - before) / 2**20, "steps": built.plan.total, "step_s": step,
             "hours": hours, "device_hours": hours * ranks.world}
    if ranks.is_main:
        log.info("Dry run: %.3g GFLOP an image forward, %.0f MiB at most, %.3g s a step, so %.3g h (%.3g "
                 "device-hours), evaluation not counted.", found["flops"] / 1e9, found["memory_mib"], step, hours,
                 found["device_hours"])
    return found


def _steps(built: Built, stop: StopRequest) -> Iterator[float]:
    """Seconds of each step, with the wait for its data; none where it was asked to stop."""
    ranks, total = built.ranks, 0.0
    parts, few = _parts(built)
    data = replace(built.settings.data, batch_size=few * built.micro_batch * ranks.world)
    make_batches = build.batch_maker(replace(built.settings, data=data), built.splits.train, ranks)
    with closing(make_batches(0, WARM_UP + MAX_STEPS, built.micro_batch)) as stream:
        for number in range(1, WARM_UP + MAX_STEPS + 1):
            start = time.perf_counter()
            _, update = built.stepper.update(built.state, next(stream), stop)
            if update is None:
                return
            float(update.loss)  # waits for the device
            taken = time.perf_counter() - start
            yield taken * parts / few
            total += taken
            if number >= WARM_UP + MIN_STEPS and ranks.max(int(total > ENOUGH_S)):
                return


def _parts(built: Built) -> tuple[int, int]:
    """Micro-batches of a step, and the few of them that are timed: the rest of an update takes next to nothing."""
    settings, whole = built.settings, built.micro_batch * built.ranks.world
    parts = settings.data.batch_size // whole
    return parts, next(few for few in range(min(parts, FEW_PARTS), parts + 1)
                       if few * whole % settings.augment.repeats == 0)
