"""`deepvit predict CHECKPOINT IMAGE...`: the five most probable classes of each image."""

import argparse
import sys
from collections.abc import Sequence

import torch

from deepvit.analysis.images import class_names, read_images, top_classes
from deepvit.errors import BAD_INPUT, DONE, UserError
from deepvit.importers import open_model
from deepvit.importers.settings import paths_and_keywords


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="deepvit predict", description=__doc__)
    parser.add_argument("checkpoint", help="a run folder, a checkpoint of any dialect, or a name such as timm:NAME")
    parser.add_argument("images", nargs="+", metavar="IMAGE|KEY=VALUE", help="images or folders of them, and settings "
                        "that the file does not say about its model, such as num_heads=12")
    parser.add_argument("--top", type=int, default=5, help="how many classes (default 5)")
    parser.add_argument("--weights", choices=["auto", "ema", "raw"], default="auto", help="auto: EMA if there is one")
    given = parser.parse_intermixed_args(arguments)
    paths, keywords = paths_and_keywords(given.images)
    if given.top < 1:
        raise UserError(f"--top {given.top} is too few: give 1 or more.")
    model = open_model(given.checkpoint, given.weights, **keywords)
    images = read_images(model, paths)
    with torch.no_grad():
        logits = model(images.x)  # [B, C]
    for name, guesses in zip(images.names, top_classes(logits, class_names(model), given.top), strict=True):
        print(name, *(f"  {probability:7.2%}  {label}" for label, probability in guesses), sep="\n")
    for sentence in images.refused:
        print(sentence, file=sys.stderr)
    return BAD_INPUT if images.refused else DONE
