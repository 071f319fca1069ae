"""What is known of a run: in words before it starts, measured while it trains, and in numbers when it is done."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from deepvit import analysis
from deepvit.analysis.board import draw_probe, without_matrices
from deepvit.config.json_lines import read_json_lines
from deepvit.config.provenance import versions
from deepvit.data import SOURCES, resolve_decoder
from deepvit.engine.device import device_name, local_world, usable_cores
from deepvit.engine.fit import Measures
from deepvit.engine.folder import RunFolder
from deepvit.engine.progress import Meter
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.models.cost import count_flops, count_parameters
from deepvit.run import build
from deepvit.run.build import Built
from deepvit.run.evaluator import Evaluator, calibration, images_to_calibrate


def summary_of(built: Built) -> str:
    """The run in a line."""
    settings, splits, plan, ranks = built.settings, built.splits, built.plan, built.ranks
    parts = plan.batch_size // ranks.world // built.micro_batch
    source = SOURCES[settings.data.source].title or settings.data.source
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
        remarks.append(f"the head norm takes its statistics over the whole batch, which has fewer than "
                       f"model.attention.norm_batch={group} images")
    if plan.batch_size > len(splits.train):
        remarks.append("images repeat within a batch")
    if settings.data.on_device:
        remarks.append("the training images stay on the device, so data.workers serve evaluation alone")
    elif settings.data.workers * local_world(ranks) > usable_cores():
        remarks.append(f"data.workers={settings.data.workers} (per device) exceeds the {usable_cores()} cores here")
    return "; ".join(remarks)


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
        x = torch.cat([built.prepare(batch, 0, ranks.device, training=False)[0] for batch in batches()])
        if not step and not settings.init:
            model = analysis.with_statistics_of(model, x)  # an untrained norm has none yet
        values = analysis.probe(model, x, matrix=True)
        return without_matrices(values), partial(draw_probe, values)

    return measure


def headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The entries of `metrics.json` by which runs are compared."""
    names = ("top1", "top5", "loss", "best_top1", "params", "flops", "images_per_s")
    return {name: metrics[name] for name in names if name in metrics}


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
        "decoder": resolve_decoder(settings.data.decoder),
        "decoder_refused": sum(line.get("decoder_refused", 0) for line in lines),  # times that PIL read a JPEG instead
        "classes": len(built.splits.class_ids), "epochs": state.step * plan.batch_size / plan.epoch_size,
        "steps": state.step, "images_per_s": meter.images_per_s, "ema": bool(settings.ema.decay),
        "probe_initial": probes.get(0), "probe_final": probes.get(state.step),
        "devices": built.ranks.world, "device": device_name(built.ranks.device), **versions()}
