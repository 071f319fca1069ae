"""`deepvit predict CHECKPOINT IMAGE...`: the five most probable classes of each image."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deepvit.analysis.images import class_names, read_images, top_classes
from deepvit.errors import BAD_INPUT, DONE, UserError
from deepvit.importers import open_model
from deepvit.importers.settings import paths_and_keywords


def predict(checkpoint: str, images: Sequence[Path], top: int = 5, **keywords: Any
            ) -> tuple[dict[str, list[tuple[str, float]]], list[str]]:
    """The `top` classes of each image, file -> [(name, probability), ...], best first; and a sentence for each image
    that could not be read. `keywords`: as `open_model`, for what the file does not tell. Raises UserError for an
    unreadable checkpoint, or no image that can be used."""
    model = open_model(checkpoint, **keywords)
    images = read_images(model, images)
    with torch.no_grad():
        logits = model(images.x)  # [B, C]
    return dict(zip(images.names, top_classes(logits, class_names(model), top), strict=True)), images.refused


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="deepvit predict", description=__doc__)
    parser.add_argument("checkpoint", help="a run folder, a checkpoint of any dialect, or a name such as timm:NAME")
    parser.add_argument("images", nargs="+", metavar="IMAGE|KEY=VALUE", help="images or folders of them, and settings "
                        "for what the file does not tell of its model, such as num_heads=12")
    parser.add_argument("--top", type=int, default=5, help="how many classes (default 5)")
    parser.add_argument("--weights", choices=["auto", "ema", "raw"], default="auto", help="auto: EMA if there is one")
    given = parser.parse_intermixed_args(arguments)
    images, keywords = paths_and_keywords(given.images)
    if given.top < 1:
        raise UserError(f"--top {given.top} is too few: give 1 or more.")
    results, refused = predict(given.checkpoint, images, given.top, weights=given.weights, **keywords)
    for path, guesses in results.items():
        print(path)
        for name, probability in guesses:
            print(f"  {probability:7.2%}  {name}")
    for sentence in refused:
        print(sentence, file=sys.stderr)
    return BAD_INPUT if refused else DONE
