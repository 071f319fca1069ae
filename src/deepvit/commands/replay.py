"""Looks at one batch of a run again, module by module: `deepvit replay RUN --batch 57`.

The run is rebuilt from its folder alone, with the weights that it gave up with or those of its last checkpoint, and
the batch is drawn, augmented and mixed as it was, with the dropout that it had. Nothing is written.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

from deepvit.config.settings import Settings
from deepvit.engine import checkpoint
from deepvit.engine.folder import RunFolder
from deepvit.engine.nonfinite import Examination, examine
from deepvit.engine.ranks import Ranks, pick_device
from deepvit.errors import DONE, UserError
from deepvit.run import build, micro_batches
from deepvit.run.console import set_up_logging
from deepvit.run.resume import settings_of

log = logging.getLogger(__name__)


def replay(run: Path, batch: int, weights: Path | None = None) -> list[Examination]:
    """Forward and backward of global batch number `batch` of the run in folder `run`, as each of its ranks saw it, with
    a checkpoint's `weights`, by default those of the run's giving up, else its last. Raises UserError if there is no
    run, no such batch, or no whole checkpoint."""
    if batch < 0:
        raise UserError(f"--batch {batch} is no batch: give its number, 0 or more, from events.jsonl.")
    folder = RunFolder(run)
    settings = settings_of(folder)
    path, content = _given(weights) if weights else _newest(folder)
    log.info("Batch %d of %s with the weights of step %d (%s).", batch, run, content["step"], path.name)
    return [_share(settings, content, batch, rank) for rank in range(content["world"])]


def _newest(folder: RunFolder) -> tuple[Path, dict[str, Any]]:
    found = checkpoint.load_newest(folder.nonfinite, folder.last, folder.previous)
    if found is None:
        raise UserError(f"The run in {folder.path} has no checkpoint yet.")
    return found


def _given(weights: Path) -> tuple[Path, dict[str, Any]]:
    advice = "give the run's last.pt, previous.pt or nonfinite.pt."
    if not weights.is_file():
        raise UserError(f"--weights {weights} does not exist or is no file: {advice}")
    try:
        content = checkpoint.load(weights)
    except UserError:
        raise UserError(f"--weights {weights} cannot be read as a checkpoint of a run: {advice}") from None
    if "world" not in content:
        raise UserError(f"--weights {weights} holds weights without the state of their training: {advice}")
    return weights, content


def _share(settings: Settings, content: dict[str, Any], number: int, rank: int) -> Examination:
    splits = build.splits(settings.data)
    world = content["world"]
    alone = Ranks(rank, world, pick_device(settings.engine.accelerator))  # in its place, but without the others
    network = build.model(settings, len(splits.class_ids), continued=True)
    state = build.state(settings, network, alone)
    state.load_state_dict(content)
    schedule, _ = build.schedule_and_plan(settings, len(splits.train))
    size = content.get("micro_batch") or micro_batches.allowed(settings, network.norm_batches, world)[0]
    stepper = build.stepper(settings, network, schedule, len(splits.class_ids), alone,
                            masks=content.get("masks") == "image")
    drawn = next(build.batch_maker(settings, splits.train, alone)(number, 1, size))
    return examine(stepper, state, drawn, number)


def show(found: Examination, rank: int) -> None:
    """A table of what every module gave, and what went wrong first."""
    print(f"\nrank {rank}: loss {found.loss:g}\n{'module':40} {'smallest':>12} {'largest':>12} {'gradient':>12}")
    for name, (low, high, gradient) in found.ranges.items():
        print(f"{name:40} {low:12.4g} {high:12.4g} {gradient:12.4g}")
    print(f"First not finite: {found.first or 'nothing'}.")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="deepvit replay", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="its folder")
    parser.add_argument("--batch", type=int, required=True, help="number of the global batch, from events.jsonl")
    parser.add_argument("--weights", type=Path, help="another checkpoint of the run")
    options = parser.parse_args(arguments)
    set_up_logging()
    examined = replay(options.run, options.batch, options.weights)
    for rank, found in enumerate(examined):
        show(found, rank)
    print(f"\nLoss of the batch: {sum(found.loss for found in examined) / len(examined):.6g}")
    return DONE
