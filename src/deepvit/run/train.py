"""One run on one rank: from settings to a finished run folder."""

import logging
import os
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from deepvit import analysis
from deepvit.analysis.board import draw_probe
from deepvit.config.provenance import versions
from deepvit.config.settings import Settings
from deepvit.data import DOWNLOADING, Splits, resolve_decoder
from deepvit.engine import checkpoint
from deepvit.engine.board import Board
from deepvit.engine.checkpoint import write_text_synced
from deepvit.engine.device import device_name, local_world, prepare_device, usable_cores
from deepvit.engine.evaluate import evaluate
from deepvit.engine.fit import Fit
from deepvit.engine.folder import LogFile, RunFolder, read_json_lines
from deepvit.engine.progress import Display
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.errors import UserError
from deepvit.models.cost import count_flops, count_parameters
from deepvit.run import build
from deepvit.run.resume import pictures_of, refuse_change, refuse_finished

log = logging.getLogger(__name__)


def train(config: Mapping[str, Any], path: Path, ranks: Ranks, stop: StopRequest) -> bool:
    """Trains as `config` says in the run folder `path`, continuing what stands there.

    Returns:
        True: finished (now or before); False: stopped on request, and the same command continues.
    Raises:
        UserError, Failure: on every rank alike where the cause is common.
    """
    settings, folder = build.read_settings(config), RunFolder(path)
    prepare_device(build.precision(settings.precision), ranks)
    with ranks.together():
        build.check(settings, ranks)
    with ranks.together():
        if ranks.is_main:
            folder.claim()
            if settings.fresh and not _restarts():
                folder.clear()
    try:
        if ranks.from_main(folder.is_finished()):
            with ranks.together():
                refuse_finished(folder, config)
            _say_finished(folder)
            return True
        return _train(config, settings, folder, ranks, stop)
    finally:
        folder.release()


def _train(config: Mapping[str, Any], settings: Settings, folder: RunFolder, ranks: Ranks, stop: StopRequest) -> bool:
    splits = _splits(settings, ranks)
    with ranks.together():
        schedule, plan = build.schedule_and_plan(settings, len(splits.train))
        found = checkpoint.load_newest(folder.last, folder.previous, advice="fresh=true starts over.")
        if found:
            refuse_change(found[1], config, splits)
        network = build.model(settings, len(splits.class_ids), continued=found is not None)
        state = build.state(settings, network, ranks)
        if found:
            state.load_state_dict(found[1])
        draw = build.draw(settings, splits.train, ranks)
    _refuse_different_folders(ranks.gather((state.step, state.batch)), folder)
    stepper = build.stepper(settings, network, schedule, len(splits.class_ids), ranks)
    processes = ranks.gather(os.getpid())
    if ranks.is_main:
        _open(folder, config, state.step if found else None, describe(settings, network, splits, plan, ranks),
              processes)
    identity = {"config": network.config, "classes": splits.class_ids, "class_names": splits.class_names,
                "pictures": pictures_of(splits), "run": dict(config)}
    fit = Fit(state, stepper, plan, draw, _evaluator(settings, splits, ranks, stop), folder, ranks, stop,
              probe=_prober(settings, splits, ranks), identity=identity)
    finished = fit.run()
    if finished and ranks.is_main:
        result = _result(settings, config, splits, fit, network, folder, ranks)
        folder.write_result(result)
        folder.log_event("finished", step=state.step)
        log.info("Finished: top-1 %.2f %%; results in %s", result["top1"], folder.path)
    return finished


def _splits(settings: Settings, ranks: Ranks) -> Splits:
    """The pictures; where they may have to be downloaded, the first rank of each machine goes before the others."""
    is_first = settings.data.source not in DOWNLOADING or int(os.environ.get("LOCAL_RANK", 0)) == 0
    for mine in (is_first, not is_first):
        with ranks.together():
            if mine:
                splits = build.splits(settings.data)
    return splits


def _restarts() -> int:
    """How often the launcher started all ranks again in this very run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _refuse_different_folders(positions: list[tuple[int, int]], folder: RunFolder) -> None:
    if len(set(positions)) > 1:
        found = ", ".join(f"rank {rank} step {step}" for rank, (step, _) in enumerate(positions))
        raise UserError(f"The ranks found different checkpoints in {folder.path} ({found}): all machines must see the "
                        f"same folder, on a file system that they share.")


def describe(settings: Settings, network: torch.nn.Module, splits, plan, ranks: Ranks) -> str:
    """The run in a line, said before it starts."""
    parts = build.accumulation(settings, ranks.world)
    source = settings.data.source
    source = "the built-in digits (recipe= chooses others)" if source == "digits" else source
    remarks = [
        f"{count_parameters(network):,} parameters, {network.depth} blocks",
        f"{len(splits.train):,} pictures in {len(splits.class_ids)} classes from {source}, {len(splits.val):,} to "
        f"evaluate",
        f"{plan.total:,} steps of {plan.batch_size} pictures ({ranks.world} x {ranks.device.type}"
        f"{f', {parts} micro-batches' if parts > 1 else ''})"]
    if plan.batch_size > len(splits.train):
        remarks.append("pictures repeat within a batch")
    if settings.data.workers * local_world(ranks) > usable_cores():
        remarks.append(f"data.workers={settings.data.workers} (each device's) is more than the {usable_cores()} cores "
                       f"here can serve")
    return "; ".join(remarks)


def _open(folder: RunFolder, config: Mapping[str, Any], resumed_at: int | None, summary: str,
          processes: list[int]) -> None:
    """Rank 0's first writes, once nothing can be refused any more."""
    write_text_synced(folder.config, yaml.safe_dump(dict(config), sort_keys=False))
    logging.getLogger("deepvit").addHandler(LogFile(folder.path / "train.log"))
    folder.drop_metrics_after(resumed_at or -1)  # step 0 writes its own lines again
    event = "start" if resumed_at is None else "resume"
    folder.log_event(event, step=resumed_at or 0, processes=processes,
                     restarts=_restarts(), decoder=resolve_decoder(config["data"]["decoder"]), **versions())
    log.info("%s", summary)
    log.info("%s %s", "Starting in" if resumed_at is None else f"Continuing from step {resumed_at} in", folder.path)


def _evaluator(settings: Settings, splits, ranks: Ranks, stop: StopRequest):
    prepare = build.prepare(settings.data, len(splits.class_ids))
    precision, batches = build.precision(settings.precision), build.eval_batches(settings.data, splits.val, ranks)

    def run(state, display: Display):
        bar = display.bar("evaluate", len(splits.val))
        result = evaluate(state.evaluated_model, batches(), prepare, ranks, precision, n=len(splits.val),
                          advance=bar.advance, should_stop=lambda: ranks.any_asked_to_stop(bool(stop)))
        bar.close()
        return result

    return run


def _prober(settings: Settings, splits, ranks: Ranks):
    """Looks at the attention on a fixed batch: the first pictures of each class in turn, as evaluation sees them."""
    wanted = min(settings.probe.images, len(splits.val))
    if not wanted or not ranks.is_main:
        return None
    chosen = splits.val.take(_spread(splits.val.targets, wanted))
    batches = build.eval_batches(settings.data, chosen, Ranks(0, 1, ranks.device))
    prepare = build.prepare(settings.data, len(splits.class_ids))

    def look(model: torch.nn.Module, board: Board, step: int) -> dict[str, Any]:
        x = torch.cat([prepare(batch, 0, ranks.device, training=False)[0] for batch in batches()])
        if not step and not settings.init:
            model = analysis.with_statistics_of(model, x)  # an untrained norm has none yet
        return draw_probe(board, analysis.probe(model, x, matrix=True), step)

    return look


def _spread(targets, wanted: int):
    """Indices of `wanted` pictures, as many of each class as can be."""
    order = np.argsort(targets, kind="stable")
    turn = np.concatenate([np.arange(count) for count in np.unique(targets, return_counts=True)[1]])
    return np.sort(order[np.argsort(turn, kind="stable")][:wanted])


def _result(settings: Settings, config, splits, fit: Fit, network, folder: RunFolder, ranks: Ranks) -> dict[str, Any]:
    """`metrics.json`: the last checkpoint's numbers and all that is needed to trust and to tabulate them."""
    lines = list(read_json_lines(folder.metrics))
    probes = {line["step"]: line["probe"] for line in lines if "probe" in line}
    last = [line for line in lines if "top1" in line][-1]
    attention = settings.model["attention"]
    return {
        "finished": True, **{name: last[name] for name in last if name not in ("step", "epoch")},
        "best_top1": fit.state.best["top1"], "best_step": fit.state.best["step"],
        "params": count_parameters(network), "flops": count_flops(network),
        "depth": network.depth, "embed_dim": network.embed_dim, "attention": attention.get("name", attention["class"]),
        "seed": settings.seed, "data": settings.data.source, "train_pictures": len(splits.train),
        "decoder": resolve_decoder(settings.data.decoder),
        "decoder_refused": sum(line.get("decoder_refused", 0) for line in lines),  # times that PIL read a JPEG instead
        "classes": len(splits.class_ids), "epochs": fit.state.batch * fit.plan.batch_size / fit.plan.epoch_size,
        "steps": fit.state.step, "images_per_s": fit.meter.images_per_s, "ema": bool(settings.ema.decay),
        "probe_initial": probes.get(0), "probe_final": probes.get(fit.state.step),
        "devices": ranks.world, "device": device_name(ranks.device), **versions()}


def _say_finished(folder: RunFolder) -> None:
    result = folder.read_result()
    log.info("The run in %s is finished (top-1 %.2f %% after %d steps); fresh=true starts over.", folder.path,
             result["top1"], result["steps"])


def dry_run(config: Mapping[str, Any], ranks: Ranks, stop: StopRequest) -> dict[str, float] | None:
    """Builds everything, makes three updates, writes nothing; prints and returns what the run would take (None: asked
    to stop)."""
    settings = build.read_settings(config)
    prepare_device(build.precision(settings.precision), ranks)
    with ranks.together():
        build.check(settings, ranks)
    splits = _splits(settings, ranks)
    with ranks.together():
        schedule, plan = build.schedule_and_plan(settings, len(splits.train))
        network = build.model(settings, len(splits.class_ids))
        state = build.state(settings, network, ranks)
        stepper = build.stepper(settings, network, schedule, len(splits.class_ids), ranks)
        draw = build.draw(settings, splits.train, ranks)
    seconds = []
    for batches in draw(0, 3):
        start = time.perf_counter()
        float(stepper.update(state, batches).loss)  # waits for the device
        seconds.append(time.perf_counter() - start)
        if ranks.any_asked_to_stop(bool(stop)):
            return None
    step = min(seconds[1:])  # the first warms up
    forecast = {"params": count_parameters(network), "flops": count_flops(network),
                "memory_mib": _peak_memory_mib(ranks.device), "steps": plan.total, "step_s": step,
                "hours": step * plan.total / 3600, "device_hours": step * plan.total * ranks.world / 3600}
    if ranks.is_main:
        log.info("%s", describe(settings, network, splits, plan, ranks))
        log.info("Dry run: %.3g GFLOP a picture forward, %.0f MiB at most so far, %.3g s a step, so %.3g h "
                 "(%.3g device-hours), evaluation not counted.", forecast["flops"] / 1e9, forecast["memory_mib"], step,
                 forecast["hours"], forecast["device_hours"])
    return forecast


def _peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
