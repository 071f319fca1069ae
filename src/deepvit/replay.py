"""Looks at one batch of a run again, module by module: `python -m deepvit.replay RUN --batch 57`.

The run is rebuilt from its folder alone, with the weights that it gave up with or those of its last checkpoint, and
the batch is drawn, augmented and mixed as it was, with the dropout that it had. Nothing is written.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import yaml

from deepvit import build
from deepvit.engine import checkpoint
from deepvit.engine.folder import RunFolder
from deepvit.engine.nonfinite import Examination
from deepvit.engine.ranks import Ranks, pick_device
from deepvit.errors import Failure, UserError
from deepvit.launch import BAD_INPUT, DONE, FAILED, set_up_logging
from deepvit.settings import Settings, read_settings

log = logging.getLogger(__name__)


def replay(run: Path, batch: int, weights: Path | None = None) -> list[Examination]:
    """Forward and backward of global batch number `batch` of the run in folder `run`, as each of its ranks saw it.

    Args:
        weights: a checkpoint; by default the one of the run's giving up, else its last.
    Raises:
        UserError: no run there, or no whole checkpoint of it.
    """
    folder = RunFolder(run)
    if not folder.config.exists():
        raise UserError(f"There is no run in {run}: it has no config.yaml.")
    settings = read_settings(yaml.safe_load(folder.config.read_text()))
    found = checkpoint.load_newest(*([weights] if weights else [folder.nonfinite, folder.last, folder.previous]))
    if found is None:
        raise UserError(f"The run in {run} has no checkpoint yet.")
    log.info("Batch %d of %s with the weights of step %d (%s).", batch, run, found[1]["step"], found[0].name)
    return [_share(settings, found[1], batch, rank) for rank in range(found[1]["world"])]


def _share(settings: Settings, content: dict[str, Any], number: int, rank: int) -> Examination:
    splits = build.splits(settings.data)
    alone = Ranks(0, 1, pick_device(settings.engine.accelerator))
    network = build.model(settings, len(splits.class_ids), continued=True)
    state = build.state(settings, network, alone)
    state.load_state_dict(content)
    schedule, _ = build.schedule_and_plan(settings, len(splits.train))
    as_it_was = Ranks(rank, content["world"], alone.device)
    stepper = build.stepper(settings, network, schedule, len(splits.class_ids), alone)
    drawn = next(build.draw(settings, splits.train, as_it_was)(number, 1))
    return stepper.examine(state, drawn, number, rank)


def show(found: Examination, rank: int) -> None:
    """A table of what every module gave, and what went wrong first."""
    print(f"\nrank {rank}: loss {found.loss:g}\n{'module':40} {'smallest':>12} {'largest':>12} {'gradient':>12}")
    for name, (low, high, gradient) in found.ranges.items():
        print(f"{name:40} {low:12.4g} {high:12.4g} {gradient:12.4g}")
    print(f"First not finite: {found.first or 'nothing'}.")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deepvit.replay", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="its folder")
    parser.add_argument("--batch", type=int, required=True, help="number of the global batch, from events.jsonl")
    parser.add_argument("--weights", type=Path, help="another checkpoint of the run")
    options = parser.parse_args(arguments)
    set_up_logging()
    try:
        for rank, found in enumerate(replay(options.run, options.batch, options.weights)):
            show(found, rank)
    except UserError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except Failure as error:
        print(error, file=sys.stderr)
        return FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main())
