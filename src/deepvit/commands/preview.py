"""A picture of an augmented batch as the model sees it: `deepvit preview OUT.png [overrides]`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from deepvit.commands.cli import quoted, sentences
from deepvit.config.compose import compose
from deepvit.data.loader import Batch, train_batches
from deepvit.data.prepare import Prepare
from deepvit.data.sources import load
from deepvit.data.transforms import norm_values, train_transform
from deepvit.errors import DONE, UserError

COLUMNS, MOST = 8, 32  # tiles
HELP = (f"Writes up to {MOST} augmented training pictures, as the model sees them, to OUT.png.\n"
        "Settings are those of train.py, such as data=cifar10 augment.mixup=0.8.")


def draw(batches: Sequence[Batch], prepare: Prepare, path: str | Path, class_names: Sequence[str], step: int = 0
         ) -> None:
    """Write up to 32 training pictures of a step, after mixing and erasing, each with its (soft) classes."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    tiles = []
    for batch in batches:
        x, y = prepare(batch, step, "cpu", True)
        values = (x * prepare.std.cpu() + prepare.mean.cpu()).div(255).clamp(0, 1)  # [b, 3, S, S] back in 0..1
        tiles += list(zip(values.permute(0, 2, 3, 1), y, strict=True))
    tiles = tiles[:MOST]
    rows = -(-len(tiles) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(COLUMNS * 1.7, rows * 1.95), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (pixels, target) in zip(axes.flat, tiles, strict=False):
        axis.imshow(pixels.numpy(), interpolation="nearest")
        axis.set_title(_caption(target, class_names), fontsize=7, parse_math=False)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"The picture cannot be written to {path} ({error.strerror}).") from error
    finally:
        pyplot.close(figure)


def _caption(target: torch.Tensor, names: Sequence[str], longest: int = 16) -> str:
    if target.ndim == 0:
        return names[int(target)].split(",")[0][:longest]
    top = target.topk(min(2, len(names)))
    shown = [(share, names[at].split(",")[0][:longest]) for share, at in zip(top.values.tolist(), top.indices.tolist(),
                                                                            strict=True)]
    least = 1.5 * float(target.min())  # smoothing alone
    return "\n".join(f"{name} {share:.2f}" for share, name in shown if share > least)


def draw_config(data: Mapping, augment: Mapping, seed: int, path: str | Path) -> None:
    """The first step of the run that these two config groups describe."""
    splits = load(**_taken(load, data), seed=seed)
    mean, std = norm_values(data["norm"])
    transform = train_transform(data["img_size"], **_taken(train_transform, augment), crop_pct=data["crop_pct"],
                                mean=mean)
    prepare = Prepare(mean, std, len(splits.class_ids), **_taken(Prepare, augment), seed=seed)
    size = min(data["batch_size"], MOST)
    batches = train_batches(splits.train, transform, seed=seed, batch_size=size, steps=1, repeats=augment["repeats"],
                            max_bad=data["max_bad"])
    draw(next(batches), prepare, path, splits.class_names)


def _taken(function: Callable, group: Mapping) -> dict[str, object]:
    return {key: group[key] for key in inspect.signature(function).parameters if key in group}


def main(arguments: Sequence[str]) -> int:
    """The program: the picture to write, then overrides as for train.py."""
    if {"-h", "--help"} & {*arguments}:
        print(f"usage: deepvit preview OUT.png [SETTING=VALUE ...]\n\n{HELP}")
        return DONE
    if not arguments or "=" in arguments[0]:
        raise UserError("Give the picture to write first: deepvit preview OUT.png data=cifar10 ...")
    if not arguments[0].endswith(".png"):
        raise UserError(f"{arguments[0]} is no .png file: give the picture to write a name that ends in .png.")
    with sentences():
        config = compose([*map(quoted, arguments[1:])])
    draw_config(config["data"], config["augment"], config["seed"], arguments[0])
    print(f"Wrote {arguments[0]}")
    return DONE
