"""One training run on one rank, from settings to a finished run folder."""

import logging
import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from deepvit.config.provenance import versions
from deepvit.config.settings import Settings
from deepvit.data import resolve_decoder
from deepvit.engine import checkpoint
from deepvit.engine.checkpoint import Saver
from deepvit.engine.device import device_name, prepare_device
from deepvit.engine.fit import Fit
from deepvit.engine.folder import LogFile, RunFolder, write_text_synced
from deepvit.engine.loggers import LoggedRun, Logger, Loggers, chosen
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.errors import UserError
from deepvit.run import build
from deepvit.run.build import Built
from deepvit.run.launch import Stopped
from deepvit.run.measures import attention_metrics, evaluator, metrics_of, summary_of
from deepvit.run.resume import (as_begun, identity, refuse_finished, refuse_past_the_end, with_changes,
                                with_model_of_init)

HEADLINE = ("top1", "top5", "loss", "best_top1", "params", "flops", "images_per_s")  # by which runs are compared
log = logging.getLogger(__name__)


def train(config: Mapping[str, Any], path: Path, ranks: Ranks, stop: StopRequest) -> dict[str, float]:
    """Trains as `config` says in the run folder `path`, resuming what is there. Returns the top-1 of the finished run.
    Raises Stopped on request (the same command continues it); UserError or Failure, on all ranks if the cause is."""
    folder, restarts = RunFolder(path), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    with ranks.sync_errors():
        config = with_model_of_init(config, folder)
    config = build.with_precision(config if config["fresh"] else as_begun(config, folder), ranks.device)
    settings = build.read_settings(config)
    viewers = chosen(settings.logger)
    prepare_device(build.precision(settings.precision, ranks.device), ranks, settings.engine.threads,
                   settings.engine.deterministic)
    build.check(settings, ranks)
    with folder.claimed(ranks, settings.fresh, restarted=restarts > 0) as starts_over:
        if not starts_over and ranks.gather(folder.is_finished())[0]:
            _answer_as_finished(folder, config, settings, ranks)
            return {"top1": folder.read_result().get("top1")}

        # Where a run's weights come from: its own checkpoint; in a new run `init`; else random ones, from the seed.
        with ranks.sync_errors():
            files = () if starts_over else (folder.last, folder.previous)
            found, begun = checkpoint.load_newest(*files, advice="fresh=true starts over.") or (None, None)
            if begun and "optimizer" not in begun:
                raise UserError(f"{found} holds weights alone, which cannot continue a run: start another from them, "
                                f"with init={found} and hydra.run.dir=...")
        built = build.build(settings, ranks, begun)
        with ranks.sync_errors():
            made_of = identity(settings, built.splits, folder, ranks.world)
            if begun:
                config = with_changes(config, begun, built.splits, made_of)
                built.state.load_state_dict(begun)
                refuse_past_the_end(built.state.step, built.plan.total)
            evaluate = evaluator(built, stop)
        _refuse_different_folders(ranks.gather(built.state.step), folder)
        built.state.evaluated = ranks.gather(folder.last_evaluation(built.state.evaluated))[0]  # others see it later

        if starts_over and ranks.is_main:
            folder.set_aside()  # until the first checkpoint stands
        saver = Saver(folder, ranks, {**_metadata(config, built), **made_of})
        processes = ranks.gather(os.getpid())
        with ranks.sync_errors():
            loggers = _open(folder, config, built, viewers, processes, resumed=begun is not None, restarts=restarts)
        with closing(loggers):
            fit = Fit(built.state, built.stepper, built.plan, built.make_batches, evaluate, folder, saver, loggers,
                      stop, attention_metrics(built))
            if not fit.run():
                raise Stopped
            if ranks.is_main:
                metrics = {**metrics_of(built, fit.meter, folder), "origin": config.get("origin"), "made_of": made_of}
                folder.write_result(metrics)
                folder.log_event("finished", step=built.state.step)
                loggers.log_result({name: metrics[name] for name in HEADLINE if metrics.get(name) is not None},
                                   built.state.step)
                if settings.engine.keep == "best":
                    checkpoint.drop_all_but_best(folder)
                log.info("Finished: top-1 %.2f %%; results in %s", metrics["top1"], folder.path)
        return {"top1": folder.read_result().get("top1")}


def _answer_as_finished(folder: RunFolder, config: Mapping[str, Any], settings: Settings, ranks: Ranks) -> None:
    splits = build.shared_splits(settings.data, ranks)
    with ranks.sync_errors():
        refuse_finished(folder, config, identity(settings, splits, folder, ranks.world))
    log.info("The run in %s is finished (top-1 %.2f %% after %d steps); fresh=true starts over.", folder.path,
             *(folder.read_result()[name] for name in ("top1", "steps")))
    if settings.engine.profile:
        log.warning("engine.profile=%d has no effect on a finished run.", settings.engine.profile)
    if ranks.is_main and settings.engine.keep == "best":
        checkpoint.drop_all_but_best(folder)


def _open(folder: RunFolder, config: Mapping[str, Any], built: Built, viewers: list[type[Logger]],
          processes: list[int], resumed: bool, restarts: int) -> Loggers:
    """The first writes, once nothing can be refused any more."""
    if not built.ranks.is_main:
        return Loggers()
    step, run_id = built.state.step, folder.run_id()
    loggers = Loggers(LoggedRun(folder, run_id, step, config), viewers)  # may refuse
    write_text_synced(folder.config, yaml.safe_dump(dict(config), sort_keys=False))
    logging.getLogger("deepvit").addHandler(LogFile(folder.path / "train.log"))
    folder.drop_metrics_after(step if resumed and step else -1, built.state.evaluated)  # step 0 writes its own again
    folder.log_event("resume" if resumed else "start", step=step, steps=built.plan.total, run_id=run_id,
                     processes=processes, restarts=restarts, decoder=resolve_decoder(config["data"]["decoder"]),
                     micro_batch=built.micro_batch, **versions())
    log.info("%s", summary := summary_of(built))
    log.info("%s %s", f"Continuing from step {step} in" if resumed else "Starting in", folder.path)
    loggers.log_text("run", summary, step)
    return loggers


def _metadata(config: Mapping[str, Any], built: Built) -> dict[str, Any]:
    """What a checkpoint says of its run."""
    return {"config": built.model.config, "classes": built.splits.class_ids, "class_names": built.splits.class_names,
            "masks": "image", "run": dict(config), "micro_batch": built.micro_batch,
            "device": device_name(built.ranks.device)}


def _refuse_different_folders(steps: list[int], folder: RunFolder) -> None:
    if len(set(steps)) > 1:
        found = ", ".join(f"rank {rank} step {step}" for rank, step in enumerate(steps))
        raise UserError(f"The ranks found different checkpoints in {folder.path} ({found}): share one file system.")
