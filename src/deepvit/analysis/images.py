"""Images as a checkpoint's model wants them, and the names of its classes."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from deepvit import data
from deepvit.data.listing import KINDS, Walk, in_words, log_left_out
from deepvit.errors import UserError
from deepvit.models import ViT

PUBLISHED = {"crop_pct": None, "interpolation": "bicubic", "norm": "half", "source": None}  # where a file says nothing
log = logging.getLogger(__name__)


@dataclass
class Images:
    """`x` `[B, 3, height, width]` normalised for the model; `pixels` the same as uint8; `names` of the files."""

    x: Tensor
    pixels: Tensor
    names: list[str]
    refused: list[str]  # one sentence for each image that could not be used


def read_images(model: ViT, paths: Sequence[Path]) -> Images:
    """The images of files and folders, preprocessed as the model's run evaluates, or as the published code does if the
    model's file does not say. Without paths: digits for a model trained on them, else the two photographs that come
    with scikit-learn. Raises UserError if no image can be used."""
    if model.config["in_chans"] != 3:
        raise UserError(f"{model.load_report.path} is a model of {model.config['in_chans']} channels, and images are "
                        f"read as three: call it from Python on tensors of your own.")
    files = [file for path in paths for file in (_inside(path) if path.is_dir() else [path])]
    evaluation = evaluated_as(model)
    transform = data.eval_transform(list(model.img_size), evaluation["crop_pct"] or model.pretrained_cfg["crop_pct"],
                                    evaluation["interpolation"])
    pixels, names, refused = [], [], []
    for name, source in [(str(path), path) for path in files] or _examples(evaluation["source"]):
        try:
            image = data.open_image(source) if isinstance(source, Path) else source
        except UserError as error:
            refused.append(str(error))
            continue
        pixels.append(transform(image)[0])
        names.append(name)
    if not pixels:
        raise UserError(refused[0])
    stack = torch.stack(pixels)  # uint8 [B, 3, height, width]
    mean, std = (torch.tensor(evaluation[name]).view(3, 1, 1) * 255 for name in ("mean", "std"))
    return Images((stack - mean) / std, stack, names, refused)


def class_names(model: ViT) -> list[str]:
    """The names stored with the weights; ImageNet's for 1000 classes; else numbers."""
    stored = model.load_report.said.get("class_names") or model.load_report.said.get("classes")
    if not stored and model.num_classes == 1000:
        return ImageNetInfo().label_descriptions()
    return list(stored or (f"class {index}" for index in range(model.num_classes)))


def top_classes(logits: Tensor, names: Sequence[str], count: int = 5) -> list[list[tuple[str, float]]]:
    """The most probable (name, probability) of each image, best first, from logits `[B, C]`."""
    probabilities, classes = logits.float().softmax(-1).topk(min(count, logits.shape[-1]))
    return [[(names[index], chance) for index, chance in zip(row, chances, strict=True)]
            for row, chances in zip(classes.tolist(), probabilities.tolist(), strict=True)]


def _inside(folder: Path) -> list[Path]:
    walk = Walk()
    found = sorted(folder / os.fsdecode(name) for name in walk.images(os.fsencode(folder)))
    if not found:
        raise UserError(f"There are no images ({KINDS}) in {folder}. {in_words(walk.left_out)}".rstrip())
    log_left_out(folder, walk.left_out)
    return found


def evaluated_as(model: ViT) -> dict[str, Any]:
    """How its images are prepared (`crop_pct`, `interpolation`, `mean` and `std` of values in 0..1), and the `source`
    of its training images. Warns where its normalisation is a guess."""
    told, report, channels = told_preparation(model), model.load_report, model.config["in_chans"]
    found = PUBLISHED | told
    if not {"norm", "mean"} & told.keys() and report.dialect in ("ours", "timm", "lucidrains"):  # others have one each
        log.warning("%s does not say how its images were normalised: taken as from -1 to 1.", report.path)
    mean, std = (values[:1] * channels if channels != 3 else values for values in data.norm_values(found["norm"]))
    return {"mean": mean, "std": std} | found


def told_preparation(model: ViT) -> dict[str, Any]:
    """As much as the model's file tells, its run's or what timm records; `mean` and `std` where no `norm` has these."""
    said = model.load_report.said
    found = (said.get("run") or {}).get("data") or said
    norm = found.get("norm") or data.name_of_norm(said.get("mean"), said.get("std"))
    names = PUBLISHED if norm or not said.keys() >= {"mean", "std"} else (*PUBLISHED, "mean", "std")
    return {name: value for name in names if (value := norm if name == "norm" else found.get(name)) is not None}


def _examples(source: str | None) -> list[tuple[str, Any]]:
    if source == "digits":
        digits = data.load("digits").val
        return [(digits.name(i), digits.image(i)) for i in range(16)]
    from sklearn.datasets import load_sample_images
    photographs = load_sample_images()
    return [(Path(name).name, torch.from_numpy(pixels.copy()).permute(2, 0, 1))
            for name, pixels in zip(photographs.filenames, photographs.images, strict=True)]
