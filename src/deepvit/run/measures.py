"""What is measured of a run: its accuracy (with `calibrate=N` also by batch statistics of N training images) and its
attention; what is said of it before it starts and when it is done; and what it would take (`dry=true`)."""

import logging
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepvit import analysis
from deepvit import data as inputs
from deepvit.analysis.plots import draw_probe
from deepvit.analysis.probe import without_matrices
from deepvit.config.records import read_json_lines
from deepvit.config.provenance import versions
from deepvit.config.settings import Data, Settings
from deepvit.engine.device import device_name, local_world, peak_bytes, prepare_device, reset_peak, usable_cores
from deepvit.engine.evaluate import Evaluation, calibrate, evaluate, scores
from deepvit.engine.fit import Measures
from deepvit.engine.folder import RunFolder
from deepvit.engine.loggers import chosen
from deepvit.engine.progress import Display, Meter, clock
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.engine.step import Precision, Prepare
from deepvit.errors import UserError
from deepvit.models import ViT
from deepvit.models.registry import count_flops, count_parameters
from deepvit.run import build
from deepvit.run.build import Built
from deepvit.run.launch import Stopped
from deepvit.run.micro_batches import norm_group
from deepvit.run.resume import with_model_of_init

AUTO = 512  # images that are enough: docs/results/calibration.md
UNGROUPED = 256  # images at once where a norm has no group of its own: the published code's calibration
WARM_UP, MIN_STEPS, MAX_STEPS, ENOUGH_S = 1, 3, 50, 2.0  # of a forecast, not timed; timed: at least, at most, until
FEW_PARTS = 4  # micro-batches
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on `images`, on all ranks together; None where a rank was asked to stop. `calibration` makes
    the training images whose statistics batch norms take first, and keep unless asked to stop, so that a checkpoint has
    what was evaluated. `among`: indices of classes to choose among for `Evaluation.correct_present`."""

    data: Data
    images: inputs.ImageSet
    prepare: Prepare
    ranks: Ranks
    precision: Precision
    stop: StopRequest
    calibration: Callable[[], Iterator[inputs.Batch]] | None
    among: Tensor | None = None

    def __call__(self, model: nn.Module, display: Display | None = None, title: str = "evaluate") -> Evaluation | None:
        with nullcontext(display) if display else Display(self.ranks.is_main) as shown:
            before = self._evaluate(model, shown, title)
            if before is None or self.calibration is None:
                return before
            buffers = list(model.buffers())
            kept = [buffer.clone() for buffer in buffers]
            done = calibrate(model, self.calibration(), self.prepare, self.ranks, self.precision, self._should_stop)
            after = self._evaluate(model, shown, title) if done else None
        if after is None:
            with torch.no_grad():
                torch._foreach_copy_(buffers, kept)
            return None
        return replace(after, uncalibrated=before)

    @cached_property
    def _batches(self) -> Callable[[], Iterator[inputs.Batch]]:
        return build.eval_batches(self.data, self.images, self.ranks)

    def _evaluate(self, model: nn.Module, display: Display, title: str) -> Evaluation | None:
        bar = display.add_task(title, total=len(self.images))
        evaluation = evaluate(model, self._batches(), self.prepare, self.ranks, self.precision, n=len(self.images),
                              among=self.among, advance=partial(display.advance, bar), should_stop=self._should_stop)
        display.remove_task(bar)
        if evaluation and evaluation.bad:
            log.warning("%d of %d images cannot be used and count as wrong, such as %s (%s).", len(evaluation.bad),
                        evaluation.n, evaluation.bad[0].name, evaluation.bad[0].reason)
        return evaluation

    def _should_stop(self) -> bool:
        return self.ranks.any_asked_to_stop(bool(self.stop))


def calibration(count: int, data: Data, train: inputs.ImageSet | None, norm_batches: Collection[int | None],
                ranks: Ranks) -> Callable[[], Iterator[inputs.Batch]] | None:
    """Makes this rank's share of `count` training images, as evaluation sees them: the same shuffled ones every time,
    in whole groups of `norm_batches` (`ViT.norm_batches`), or all of fewer than one group; None for 0 of them, or for a
    model without batch statistics. UserError for a `count` below a group."""
    if not (count and norm_batches):
        if count and ranks.is_main:
            log.warning("calibrate=%d has no effect on a model without batch statistics.", count)
        return None
    group = norm_group(norm_batches)
    size = min(group if group > 1 else min(UNGROUPED, count), len(train))
    groups = min(count, len(train)) // size
    if not groups:
        raise UserError(f"calibrate={count} of {len(train):,} images make no group of norm_batch={group}: give more.")
    first, end = (groups * part // ranks.world for part in (ranks.rank, ranks.rank + 1))

    def batches() -> Iterator[inputs.Batch]:
        steps = inputs.train_batches(train, build.eval_transform(data), seed=0, batch_size=size, start_step=first,
                                     steps=end, workers=min(data.workers, end - first), max_bad=data.max_bad,
                                     pin=ranks.device.type == "cuda")
        for (batch,) in steps:
            yield batch

    return batches


def images_to_calibrate(settings: Settings, model: ViT, in_training_set: int) -> int:
    """`settings.calibrate`; `auto` is `AUTO` images, or as many as there are in whole groups, for averaged weights of a
    model with batch statistics, and none for others."""
    if settings.calibrate != "auto":
        return settings.calibrate
    if not (settings.ema.decay and model.norm_batches):
        return 0
    group = norm_group(model.norm_batches)
    return min(max(AUTO, group), in_training_set // group * group)


def evaluator(built: Built, stop: StopRequest) -> Evaluator:
    """Of the validation set; UserError where there are too few training images to calibrate."""
    settings, splits, ranks, norm_batches = built.settings, built.splits, built.ranks, built.model.norm_batches
    count = images_to_calibrate(settings, built.model, len(splits.train))
    return Evaluator(settings.data, splits.val, built.prepare, ranks, built.stepper.precision, stop,
                     calibration(count, settings.data, splits.train, norm_batches, ranks))


def attention_metrics(built: Built) -> Callable[[nn.Module, int], Measures] | None:
    """Measures of the attention on a fixed batch: the first images of each class in turn, as evaluation sees them."""
    settings, ranks, images = built.settings, built.ranks, built.splits.val
    wanted = min(settings.probe.images, len(images))
    if not wanted or not ranks.is_main:
        return None
    order = np.argsort(images.targets, kind="stable")
    rank_in_class = np.concatenate([np.arange(n) for n in np.unique(images.targets, return_counts=True)[1]])
    chosen = images.take(np.sort(order[np.argsort(rank_in_class, kind="stable")][:wanted]))
    batches = build.eval_batches(settings.data, chosen, Ranks(0, 1, ranks.device))

    def measure(model: nn.Module, step: int) -> Measures:
        x = torch.cat([built.prepare(batch, 0, ranks.device, training=False)[0][batch.usable.to(ranks.device)]
                       for batch in batches()])
        if not step and not settings.init:
            model = analysis.with_statistics_of(model, x)  # an untrained norm has none yet
        values = analysis.probe(model, x, matrix=True)
        return without_matrices(values), partial(draw_probe, values)

    return measure


def summary_of(built: Built) -> str:
    """The run in a line."""
    settings, splits, plan, ranks = built.settings, built.splits, built.plan, built.ranks
    parts = plan.batch_size // ranks.world // built.micro_batch
    source = inputs.SOURCES[settings.data.source].title or settings.data.source
    trained = sum(weight.numel() for weight in built.model.parameters() if weight.requires_grad)
    remarks = [
        f"{count_parameters(built.model):,} parameters"
        f"{f' ({trained:,} trained)' if settings.freeze is not None else ''}, {built.model.depth} blocks",
        f"{len(splits.train):,} images in {len(splits.class_ids)} classes from {source}, {len(splits.val):,} to "
        f"evaluate",
        f"{plan.total:,} steps of {plan.batch_size} images ({ranks.world} x {ranks.device.type}"
        f"{f', {parts} micro-batches' if parts > 1 else ''}"
        f"{f', {built.micro_batch} images at once in {built.memory}' if built.memory else ''})"]
    group = settings.model["attention"].get("norm_batch")
    if group and group > plan.batch_size:
        remarks.append(f"the whole batch is smaller than model.attention.norm_batch={group}")
    if plan.batch_size > len(splits.train):
        remarks.append("images repeat within a batch")
    if settings.data.on_device:
        remarks.append("the training images stay on the device, so data.workers serve evaluation alone")
    elif settings.data.workers * local_world(ranks) > usable_cores():
        remarks.append(f"data.workers={settings.data.workers} (per device) exceeds the {usable_cores()} cores here")
    return "; ".join(remarks)


def metrics_of(built: Built, meter: Meter, folder: RunFolder) -> dict[str, Any]:
    """`metrics.json`: the last checkpoint's numbers, and all that is needed to trust and tabulate them."""
    settings, state, plan, model = built.settings, built.state, built.plan, built.model
    lines = read_json_lines(folder.metrics)
    probes = {line["step"]: line["probe"] for line in lines if "probe" in line}
    last = [line for line in lines if "top1" in line][-1]
    attention = settings.model["attention"]
    return {
        "finished": True, **{name: last[name] for name in last if name not in ("step", "epoch")},
        "best_top1": state.best["top1"], "best_step": state.best["step"],
        "params": count_parameters(model), "flops": count_flops(model),
        "depth": model.depth, "embed_dim": model.embed_dim, "attention": attention.get("name", attention["class"]),
        "seed": settings.seed, "data": settings.data.source, "train_pictures": len(built.splits.train),
        "decoder": inputs.resolve_decoder(settings.data.decoder),
        "decoder_refused": sum(line.get("decoder_refused", 0) for line in lines),  # times that PIL read a JPEG instead
        "classes": len(built.splits.class_ids), "epochs": state.step * plan.batch_size / plan.epoch_size,
        "steps": state.step, "images_per_s": meter.images_per_s or None, "ema": bool(settings.ema.decay),
        "probe_initial": probes.get(0), "probe_final": probes.get(state.step),
        "devices": built.ranks.world, "device": device_name(built.ranks.device), **versions()}


def forecast(config: Mapping[str, Any], ranks: Ranks, stop: StopRequest) -> dict[str, float]:
    """Says and returns what the run would take, memory beyond what the process had before: everything is built, a few
    updates and one batch of the first evaluation are run, nothing is written."""
    with ranks.sync_errors():
        settings = build.read_settings(with_model_of_init(config))
    chosen(settings.logger)  # may refuse, as the evaluator below
    prepare_device(build.precision(settings.precision, ranks.device), ranks, settings.engine.threads,
                   settings.engine.deterministic)
    build.check(settings, ranks)
    before = reset_peak(ranks.device)
    built = build.build(settings, ranks)
    with ranks.sync_errors():
        evaluator(built, stop)
    if ranks.is_main:
        log.info("%s", summary_of(built))
        log.info("Timing a few steps.")
    seconds = list(_steps(built, stop))
    if not seconds or ranks.any_asked_to_stop(bool(stop)):
        raise Stopped("Stopped on request.")
    with closing(build.eval_batches(settings.data, built.splits.val, ranks)()) as batches, torch.no_grad():
        # may need more memory than training does
        scores(built.state.evaluated_model.eval(), next(batches), built.prepare, ranks, built.stepper.precision, [])
    step = statistics.mean(seconds[WARM_UP:] or seconds)
    hours = step * built.plan.total / 3600
    found = {"params": count_parameters(built.model), "flops": count_flops(built.model),
             "memory_mib": (peak_bytes(ranks.device) - before) / 2**20, "steps": built.plan.total, "step_s": step,
             "hours": hours, "device_hours": hours * ranks.world}
    if ranks.is_main:
        log.info("Dry run: %.3g GFLOP an image, %.0f MiB at most, %.3g s a step, %s to train (%.3g device-hours).",
                 found["flops"] / 1e9, found["memory_mib"], step, clock(hours * 3600), found["device_hours"])
    return found


def _steps(built: Built, stop: StopRequest) -> Iterator[float]:
    """Seconds of each step, with the wait for its data; none where it was asked to stop."""
    ranks, total = built.ranks, 0.0
    parts, few = _parts(built)
    period = max(MIN_STEPS, math.ceil(built.settings.data.workers / few))  # workers begin together, so end together
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
            if number > WARM_UP and (number - WARM_UP) % period == 0 and ranks.max(int(total > ENOUGH_S)):
                return


def _parts(built: Built) -> tuple[int, int]:
    """Micro-batches of a step, and the few of them that are timed: the rest of an update takes next to nothing."""
    settings, whole = built.settings, built.micro_batch * built.ranks.world
    parts = settings.data.batch_size // whole
    return parts, next(few for few in range(min(parts, FEW_PARTS), parts + 1)
                       if few * whole % settings.augment.repeats == 0)
