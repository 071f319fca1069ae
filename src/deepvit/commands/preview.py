"""A run looked at without training: `deepvit preview` draws an augmented batch as the model sees it, `deepvit regime`
prints what attention does in each block before training, `deepvit replay` repeats one batch, module by module."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from deepvit import analysis
from deepvit.commands.cli import quoted, sentences
from deepvit.commands.figures import SIGNED, refuse_strange
from deepvit.commands.main import parser_of
from deepvit.config.compose import compose
from deepvit.config.settings import Settings
from deepvit.data import Batch, Prepare, Splits, source_of
from deepvit.engine import checkpoint
from deepvit.engine.folder import RunFolder
from deepvit.engine.nonfinite import Examination, examine
from deepvit.engine.ranks import Ranks, pick_device
from deepvit.errors import DONE, UserError, writing
from deepvit.report.render import printed
from deepvit.run import build
from deepvit.run.console import set_up_logging
from deepvit.run.resume import settings_of, with_model_of_init

COLUMNS, MOST = 8, 32  # tiles
REGIME_IMAGES = 32  # the group that a norm over heads takes its statistics from
log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    parser = parser_of("preview")
    parser.add_argument("out", metavar="OUT.png", help="the image to write")
    _add_run(parser)
    given = parser.parse_args(arguments)
    if not given.out.endswith(".png"):
        raise UserError(f"{given.out} is not a .png file: give first the image to write, by a name that ends in .png.")
    refuse_strange(Path(given.out))
    batches, prepare, splits = first_batch(_settings_of(given.run))
    draw(batches, prepare, given.out, splits.class_names)
    print(f"Wrote {given.out}")
    return DONE


def regime(arguments: Sequence[str]) -> int:
    parser = parser_of("regime")
    _add_run(parser)
    settings = _settings_of(parser.parse_args(arguments).run)
    batches, prepare, splits = first_batch(settings)
    images = prepare(batches[0], 0, "cpu", True)[0][:REGIME_IMAGES]
    found = analysis.regime(build.model(settings, len(splits.class_ids)), images)
    print(printed(["block", "N std(A)", "gain", "attention", "mlp"], [
        [str(block), *(f"{value:.4g}" for value in values)] for block, values in enumerate(zip(*found.values()))]))
    return DONE


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="*", default=[], metavar="RUN_FOLDER|SETTING=VALUE",
                        help="a run, or settings of `deepvit train`, such as data=cifar10 augment.mixup=0.8")


def _settings_of(words: Sequence[str]) -> Settings:
    """Those of a run folder, or composed of settings as for train.py."""
    if words and Path(words[0]).is_dir():
        if len(words) > 1:
            raise UserError(f"The settings of the run in {words[0]} are its own: leave out {words[1]}.")
        return settings_of(RunFolder(Path(words[0])))
    if stray := next((word for word in words if "=" not in word), None):
        raise UserError(f"{stray} is neither a run folder nor a setting key=value.")
    with sentences():
        config = compose([*map(quoted, words)])
    return build.read_settings(with_model_of_init({**config, "origin": {"overrides": [*words]}}))


def first_batch(settings: Settings) -> tuple[Sequence[Batch], Prepare, Splits]:
    """The first training images of the run that `settings` describe, exactly as it sees them on one device."""
    settings = replace(settings, data=replace(settings.data, workers=0))
    splits, alone = source_of(settings.data).splits(), Ranks(0, 1, torch.device("cpu"))
    prepare = build.prepare(settings.data, len(splits.class_ids), settings.augment, settings.seed)
    return next(build.batch_maker(settings, splits.train, alone)(0, 1, settings.data.batch_size)), prepare, splits


def draw(batches: Sequence[Batch], prepare: Prepare, path: str | Path, class_names: Sequence[str]) -> None:
    """Writes up to 32 training images of the first step, after mixing and erasing, each with its (soft) classes."""
    tiles = []
    for batch in batches:
        x, y = prepare(batch, 0, "cpu", True)
        values = (x * prepare.std.cpu() + prepare.mean.cpu()).div(255).clamp(0, 1)  # [b, 3, S, S] back in 0..1
        tiles += list(zip(values.permute(0, 2, 3, 1), y, strict=True))
    rows = -(-len(tiles[:MOST]) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * 1.7, rows * 1.95))
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (pixels, target) in zip(axes, tiles[:MOST], strict=False):
        axis.imshow(pixels.numpy(), interpolation="nearest")
        axis.set_title(_caption(target, class_names), fontsize=7, parse_math=False)
    figure.tight_layout()
    with writing("The image", path, "give another name"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata=SIGNED)


def _caption(target: torch.Tensor, names: Sequence[str]) -> str:
    short = [name.split(",")[0][:16] for name in names]
    if target.ndim == 0:
        return short[int(target)]
    least = 1.5 * float(target.sort().values[-3:-2].sum())  # smoothing alone, which two classes do not show
    shares, classes = target.topk(min(2, len(names)))
    return "\n".join(f"{short[at]} {share:.2f}" for share, at in zip(shares, classes) if share > least)


def replay(arguments: Sequence[str]) -> int:
    parser = parser_of("replay")
    parser.add_argument("run", type=Path, metavar="RUN", help="its folder")
    parser.add_argument("--batch", type=int, required=True, help="number of the global batch, from events.jsonl")
    given = parser.parse_args(arguments)
    set_up_logging()
    examined = examinations(given.run, given.batch)
    for rank, found in enumerate(examined):
        print(f"\nrank {rank}: loss {found.loss:g}\n{'module':40} {'smallest':>12} {'largest':>12} {'gradient':>12}")
        for name, (low, high, gradient) in found.ranges.items():
            print(f"{name:40} {low:12.4g} {high:12.4g} {gradient:12.4g}")
        print(f"First not finite: {found.first or 'nothing'}.")
    print(f"\nLoss of the batch: {sum(found.loss for found in examined) / len(examined):.6g}")
    return DONE


def examinations(run: Path, batch: int) -> list[Examination]:
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
