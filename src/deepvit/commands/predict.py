"""`deepvit predict CHECKPOINT IMAGE...`: the five most probable classes of each picture."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from deepvit.analysis.pictures import class_names, read_pictures, top_classes
from deepvit.errors import BAD_INPUT, DONE
from deepvit.importers import load_model
from deepvit.importers.files import has_average


def predict(checkpoint: Path, images: Sequence[Path], top: int = 5
            ) -> tuple[dict[str, list[tuple[str, float]]], list[str]]:
    """The `top` classes of each picture, by the averaged weights if there are any.

    Returns:
        file -> [(name, probability), ...], best first; and a sentence for each picture that could not be read.
    Raises:
        UserError: an unreadable checkpoint, or no picture that can be used.
    """
    model = load_model(checkpoint, ema=has_average(checkpoint)).eval()
    pictures = read_pictures(model, images)
    with torch.no_grad():
        logits = model(pictures.x)  # [B, C]
    return dict(zip(pictures.names, top_classes(logits, class_names(model), top), strict=True)), pictures.refused


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="deepvit predict", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a run folder, or a checkpoint of any dialect")
    parser.add_argument("images", type=Path, nargs="+", help="pictures, or folders of them")
    parser.add_argument("--top", type=int, default=5, help="how many classes (default 5)")
    given = parser.parse_args(arguments)
    results, refused = predict(given.checkpoint, given.images, given.top)
    for path, guesses in results.items():
        print(path)
        for name, probability in guesses:
            print(f"  {probability:7.2%}  {name}")
    for sentence in refused:
        print(sentence, file=sys.stderr)
    return BAD_INPUT if refused else DONE
