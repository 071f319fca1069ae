"""A run before any training, from its folder or from settings: `deepvit preview` draws an augmented batch as the model
sees it, `deepvit regime` prints what attention does in each block."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from deepvit import analysis
from deepvit.commands.cli import quoted, sentences
from deepvit.commands.figures import SIGNED, refuse_strange
from deepvit.config.compose import compose
from deepvit.config.settings import Settings
from deepvit.data import Batch, Prepare, Splits
from deepvit.engine.folder import RunFolder
from deepvit.engine.ranks import Ranks
from deepvit.errors import DONE, UserError
from deepvit.report.render import printed
from deepvit.run import build
from deepvit.run.resume import settings_of, with_model_of_init

COLUMNS, MOST = 8, 32  # tiles
REGIME_IMAGES = 32  # the group that a norm over heads takes its statistics from
HELP = f"""usage: deepvit preview OUT.png RUN_FOLDER
       deepvit preview OUT.png [SETTING=VALUE ...]

Writes the first {MOST} training images of a run, augmented and mixed as the model sees them, to OUT.png.
Settings are those of `deepvit train`, such as data=cifar10 augment.mixup=0.8."""
REGIME_HELP = f"""usage: deepvit regime RUN_FOLDER
       deepvit regime [SETTING=VALUE ...]

Prints what each block's attention does before training, on the first {REGIME_IMAGES} training images of a run. Settings
are those of `deepvit train`, such as model.depth=16 model/attention=norm_only.

  N std(A)   the softmax maps' deviation from uniform, times the number of tokens
  gain       standard deviation of the final maps over that of the softmax maps
  attention  RMS of the attention branch over that of the residual stream that it is added to
  mlp        the same of the MLP branch"""


def main(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(HELP)
        return DONE
    if not arguments or "=" in arguments[0]:
        raise UserError("Give the image to write first: deepvit preview OUT.png data=cifar10 ...")
    if not arguments[0].endswith(".png"):
        raise UserError(f"{arguments[0]} is not a .png file: give the image to write a name that ends in .png.")
    refuse_strange(Path(arguments[0]))
    batches, prepare, splits = first_batch(_settings_of(arguments[1:]))
    draw(batches, prepare, arguments[0], splits.class_names)
    print(f"Wrote {arguments[0]}")
    return DONE


def regime(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(REGIME_HELP)
        return DONE
    settings = _settings_of(arguments)
    batches, prepare, splits = first_batch(settings)
    images = prepare(batches[0], 0, "cpu", True)[0][:REGIME_IMAGES]
    found = analysis.regime(build.model(settings, len(splits.class_ids)), images)
    print(printed(["block", "N std(A)", "gain", "attention", "mlp"], [
        [str(block), *(f"{value:.4g}" for value in values)] for block, values in enumerate(zip(*found.values()))]))
    return DONE


def _settings_of(words: Sequence[str]) -> Settings:
    """Those of a run folder, or composed of settings as for train.py."""
    if words and Path(words[0]).is_dir():
        if len(words) > 1:
            raise UserError(f"The settings of the run in {words[0]} are its own: leave out {words[1]}.")
        return settings_of(RunFolder(Path(words[0])))
    stray = next((word for word in words if "=" not in word), None)
    if stray:
        raise UserError(f"{stray} is neither a run folder nor a setting key=value.")
    with sentences():
        config = compose([*map(quoted, words)])
    return build.read_settings(with_model_of_init({**config, "origin": {"overrides": [*words]}}))


def first_batch(settings: Settings) -> tuple[Sequence[Batch], Prepare, Splits]:
    """The first training images of the run that `settings` describe, exactly as it sees them on one device."""
    settings = replace(settings, data=replace(settings.data, workers=0))
    splits, alone = build.splits(settings.data), Ranks(0, 1, torch.device("cpu"))
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
    try:
        figure.savefig(path, dpi=110, metadata=SIGNED)
    except OSError as error:
        raise UserError(f"The image cannot be written to {path} ({error.strerror}).") from error


def _caption(target: torch.Tensor, names: Sequence[str]) -> str:
    short = [name.split(",")[0][:16] for name in names]
    if target.ndim == 0:
        return short[int(target)]
    least = 1.5 * float(target.min())  # smoothing alone
    shares, classes = target.topk(min(2, len(names)))
    return "\n".join(f"{short[at]} {share:.2f}" for share, at in zip(shares, classes) if share > least)
