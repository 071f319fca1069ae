"""The uniform average of the weights of several checkpoints: `deepvit average RUN --last 5`.

Of a run its last checkpoints are taken: `last.pt`, the one before it, and those that `engine.keep_epochs` kept.
Running statistics are averaged like weights, counters are the newest's.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepvit.commands import cli
from deepvit.engine.folder import RunFolder
from deepvit.errors import DONE, UserError
from deepvit.importers import find_checkpoint, load_model, open_weights, takes_average
from deepvit.importers.ours import described, write


def average(paths: Sequence[Path], weights: str = "auto") -> dict[str, Any]:
    """The content of a checkpoint of ours: the newest one's model, which is last in `paths`, with averaged weights, and
    where they came from. `weights`: see `takes_average`, asked of the newest."""
    ema = takes_average(paths[-1], weights)
    model = load_model(paths[-1], ema=ema)
    files = [open_weights(path, ema=ema) for path in paths]
    newest = files[-1]
    for file in files:
        if file.shapes != newest.shapes or file.said.get("classes") != newest.said.get("classes"):
            raise UserError(f"{file.path} and {newest.path} are of different models or classes, which have no "
                            f"average: give checkpoints of one model.")
    if newest.shapes.keys() != model.state_dict().keys():
        raise UserError(f"{paths[-1]} is not in our own layout: `deepvit export` it to safetensors first.")
    model.load_state_dict({name: _mean([file.read(name) for file in files]) for name in newest.shapes})
    which = "ema" if ema else "raw"
    return {**described(model), "averaged": [
        {"path": str(file.path), "step": file.said.get("step"), "weights": which} for file in files]}


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """In float64; of counters the last."""
    if not tensors[-1].is_floating_point():
        return tensors[-1]
    return torch.stack([tensor.double() for tensor in tensors]).mean(0).to(tensors[-1].dtype)


def _last_of(run: Path, count: int) -> list[Path]:
    """The last `count` checkpoints of a run, the newest last."""
    folder = RunFolder(run)
    files = (*folder.checkpoints.glob("step-*.pt"), folder.previous, folder.last)
    by_step: dict[int, Path] = {open_weights(path).said.get("step", -1): path for path in files if path.exists()}
    if len(by_step) < count:
        raise UserError(f"{run} has {len(by_step)} checkpoints and {count} are to be averaged: train with "
                        f"engine.keep_epochs=1, which keeps each epoch's weights, or give --last {len(by_step)}.")
    return [by_step[step] for step in sorted(by_step)[-count:]]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="deepvit average", description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, nargs="+", metavar="RUN|CHECKPOINT",
                        help="a run folder; or two or more checkpoints or run folders (their best), the newest last")
    parser.add_argument("--last", type=int, default=5, metavar="K", help="of a run: this many (default: 5)")
    parser.add_argument("--weights", choices=["auto", "ema", "raw"], default="auto", help="auto: EMA if there is one")
    parser.add_argument("--out", type=Path, help="file to write, .pt or .safetensors (default: average.pt beside them)")
    parser.add_argument("--eval", action="store_true", help="then evaluate the newest and the average")
    given = parser.parse_args(arguments)
    paths = given.sources
    if len(paths) == 1 and paths[0].is_dir():
        paths = _last_of(paths[0], given.last)
    if len(paths) < 2:
        raise UserError("An average is of two or more checkpoints: give a run folder with --last 2 or more, or files.")
    out = given.out or find_checkpoint(paths[-1])[0].with_name("average.pt")
    if out.exists():
        raise UserError(f"{out} is there already: give another name with --out.")
    content = average(paths, given.weights)
    write(out, content)
    print(f"{out}: the average of {', '.join(str(one['path']) for one in content['averaged'])}")
    return cli.evaluate([f"checkpoint=[{paths[-1]},{out}]"]) if given.eval else DONE
