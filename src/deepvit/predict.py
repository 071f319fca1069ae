"""`python -m deepvit.predict CHECKPOINT IMAGE...`: the five most probable classes of each picture."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.data import ImageNetInfo

from deepvit.data import eval_transform, norm_values, open_picture
from deepvit.data.decode import BadPicture
from deepvit.errors import UserError
from deepvit.evaluation import has_average
from deepvit.importers import load_model
from deepvit.models import ViT

DATA = {"crop_pct": None, "interpolation": "bicubic", "norm": "half"}  # as published, where a file does not tell


def predict(checkpoint: Path, images: Sequence[Path], top: int = 5) -> list[list[tuple[str, float]]]:
    """For each picture the `top` classes as (name, probability), best first; the averaged weights if there are any.

    Raises:
        UserError: an unreadable checkpoint or picture.
    """
    model = load_model(checkpoint, ema=has_average(checkpoint)).eval()
    names = class_names(model)
    pictures = torch.stack([_preprocess(model, path) for path in images])  # [B, 3, height, width]
    with torch.no_grad():
        probabilities, classes = model(pictures).softmax(-1).topk(min(top, model.num_classes))  # [B, top]
    return [[(names[index], probability) for index, probability in zip(row, chances, strict=True)]
            for row, chances in zip(classes.tolist(), probabilities.tolist(), strict=True)]


def class_names(model: ViT) -> list[str]:
    """The names stored with the weights; ImageNet's for 1000 classes; else numbers."""
    said = model.load_report.said
    stored = said.get("class_names") or said.get("classes")
    if stored:
        return list(stored)
    if model.num_classes == 1000:
        return ImageNetInfo().label_descriptions()
    return [f"class {index}" for index in range(model.num_classes)]


def _preprocess(model: ViT, path: Path) -> torch.Tensor:
    trained_on = (model.load_report.said.get("run") or {}).get("data", {})
    settings = {name: trained_on.get(name, value) for name, value in DATA.items()}
    crop = settings["crop_pct"] or model.pretrained_cfg["crop_pct"]
    transform = eval_transform(list(model.img_size), crop, settings["interpolation"])
    try:
        pixels, _ = transform(open_picture(path))  # uint8 [3, height, width]
    except BadPicture as error:
        raise UserError(f"The picture {path} cannot be read: {error}.") from error
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in norm_values(settings["norm"]))
    return (pixels.float() - mean) / std


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deepvit.predict", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of any dialect")
    parser.add_argument("images", type=Path, nargs="+", help="pictures")
    parser.add_argument("--top", type=int, default=5, help="how many classes (default 5)")
    given = parser.parse_args(arguments)
    try:
        results = predict(given.checkpoint, given.images, given.top)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for path, guesses in zip(given.images, results, strict=True):
        print(path)
        for name, probability in guesses:
            print(f"  {probability:7.2%}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
