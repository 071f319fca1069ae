"""Looks at one batch of a run again, module by module: `deepvit replay RUN --batch 57`.

The run is rebuilt from its folder alone, with the weights that it gave up with or those of its last checkpoint, and
the batch is drawn, augmented and mixed as it was, with the same dropout. Nothing is written.
"""

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepvit.config.settings import Settings
from deepvit.engine import checkpoint
from deepvit.engine.folder import RunFolder
from deepvit.engine.nonfinite import Examination, examine
from deepvit.engine.ranks import Ranks, pick_device
from deepvit.errors import DONE, UserError
from deepvit.run import build
from deepvit.run.console import set_up_logging
from deepvit.run.resume import settings_of

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="deepvit replay", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="its folder")
    parser.add_argument("--batch", type=int, required=True, help="number of the global batch, from events.jsonl")
    options = parser.parse_args(arguments)
    set_up_logging()
    examined = replay(options.run, options.batch)
    for rank, found in enumerate(examined):
        print(f"\nrank {rank}: loss {found.loss:g}\n{'module':40} {'smallest':>12} {'largest':>12} {'gradient':>12}")
        for name, (low, high, gradient) in found.ranges.items():
            print(f"{name:40} {low:12.4g} {high:12.4g} {gradient:12.4g}")
        print(f"First not finite: {found.first or 'nothing'}.")
    print(f"\nLoss of the batch: {sum(found.loss for found in examined) / len(examined):.6g}")
    return DONE


def replay(run: Path, batch: int) -> list[Examination]:
    """Forward and backward of global batch number `batch` of the run in folder `run`, as each of its ranks saw it.
    UserError if there is no run, no such batch, or no whole checkpoint."""
    if batch < 0:
        raise UserError(f"--batch {batch} is not a batch: give its number, 0 or more, from events.jsonl.")
    folder = RunFolder(run)
    settings = settings_of(folder)
    found = checkpoint.load_newest(folder.nonfinite, folder.last, folder.previous)
    if found is None:
        raise UserError(f"The run in {folder.path} has no checkpoint yet.")
    path, content = found
    log.info("Batch %d of %s with the weights of step %d (%s).", batch, run, content["step"], path.name)
    return [_examine(settings, content, batch, rank) for rank in range(content["world"])]


def _examine(settings: Settings, content: dict[str, Any], number: int, rank: int) -> Examination:
    engine = settings.engine
    size = content.get("micro_batch", None if engine.device_batch == "auto" else engine.device_batch)
    settings = replace(settings, engine=replace(engine, device_batch=size))
    built = build.build(settings, Ranks(rank, content["world"], pick_device(engine.accelerator)), begun=content)
    if number >= built.plan.total:
        raise UserError(f"--batch {number} is not a batch of this run: it has {built.plan.total:,}, counted from 0.")
    built.state.load_state_dict(content)
    return examine(built.stepper, built.state, next(built.make_batches(number, 1)), number)
