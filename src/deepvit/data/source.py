"""What a source of images is: one class, which answers all that is asked of it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from deepvit.config.settings import RANGES
from deepvit.config.signature import check_ranges
from deepvit.data.decode import resolve_decoder
from deepvit.data.exclude import without
from deepvit.data.folders import readable_names
from deepvit.data.imageset import IN_MEMORY_MB, ImageSet, Splits, balanced_part
from deepvit.errors import UserError, did_you_mean

IMAGENET100 = Path(__file__).with_name("imagenet100.txt")


@dataclass(kw_only=True)
class Source(ABC):
    """A kind of data set, and what is asked of it; all methods raise UserError for what is wrong with either."""

    root: str | None = None  # folder of the images
    fraction: float = 1.0  # a fixed, class-balanced part of the training images, in (0, 1]
    classes: int | str | None = None  # the first k, or those in a list: a file of folder names, or `imagenet100`
    val_fraction: float | None = None  # the fixed, class-balanced part of each class held out
    seed: int = 0  # of these two choices, not of the training
    decoder: str = "auto"  # `auto`, `torchvision` or `pil`
    in_memory_mb: int = IN_MEMORY_MB
    exclude: str | None = None  # file with the names of images to leave out, as `deepvit check` writes it
    name: str | None = None  # of a timm data set, as the next two
    train_split: str = "train"
    val_split: str = "validation"

    source: ClassVar[str]  # `data.source`
    title: ClassVar[str] = ""  # in a sentence, if other than `source`
    may_download: ClassVar[bool] = False
    has_class_folders: ClassVar[bool] = False  # and nothing else: `eval_folder` reads it

    def __post_init__(self) -> None:
        check_ranges(vars(self), RANGES["data"], "data")
        self.decoder = resolve_decoder(self.decoder)
        if self.source != "timm" and (self.name, self.train_split, self.val_split) != (None, "train", "validation"):
            raise UserError(f"data.name, data.train_split and data.val_split are for data=timm, not for "
                            f"data={self.source}.")

    @abstractmethod
    def whole(self) -> Splits:
        """All classes; fewer only where that saves listing them."""

    def sets(self) -> list[ImageSet]:
        """All that is there, whether it could be trained on or not."""
        splits = self.splits()
        return [splits.train, splits.val]

    def splits(self) -> Splits:
        """What is asked for."""
        splits = _first_classes(self.whole(), self.classes)
        if self.exclude is not None:
            train, val = without([splits.train, splits.val], splits.class_ids, self.exclude, self.root)
            splits = replace(splits, train=train, val=val)
        if len(splits.class_ids) < 2:
            raise UserError(f"data.root={self.root} has one class only, '{splits.class_ids[0]}', so nothing can be "
                            f"learned: is it one level too high? Each class needs a folder below it, or below train/ "
                            f"and val/.")
        if self.fraction < 1:
            part = balanced_part(splits.train.targets, self.fraction, self.seed)
            splits = replace(splits, train=splits.train.take(part))
        return splits

    def hold_out(self, images: ImageSet, class_ids: list[str], where: str) -> Splits:
        """`val_fraction` of each class for validation, the rest for training."""
        alone = np.flatnonzero(np.bincount(images.targets, minlength=len(class_ids)) < 2)
        if len(alone):
            raise UserError(f"Class {class_ids[alone[0]]} of {where} has a single image: data.val_fraction needs "
                            f"two.")
        held = balanced_part(images.targets, self.val_fraction, self.seed)
        rest = np.setdiff1d(np.arange(len(images)), held)
        if len(np.unique(images.targets[rest])) < len(class_ids):
            raise UserError(f"data.val_fraction={self.val_fraction} leaves a class of {where} without training "
                            f"images.")
        return Splits(images.take(rest), images.take(held), readable_names(class_ids), class_ids)


def _first_classes(splits: Splits, classes: int | str | None) -> Splits:
    kept = chosen(classes, splits.class_ids)
    if kept == splits.class_ids:
        return splits
    places = np.array([kept.index(name) if name in kept else -1 for name in splits.class_ids])
    parts = [images.take(np.flatnonzero(places[images.targets] >= 0)) for images in (splits.train, splits.val)]
    for part in parts:
        part.targets = places[part.targets]
    return Splits(*parts, [name for name, place in zip(splits.class_names, places, strict=True) if place >= 0], kept)


def chosen(classes: int | str | None, class_ids: list[str]) -> list[str]:
    """Those of the classes that `data.classes` names, in the same order."""
    if classes is None:
        return class_ids
    if isinstance(classes, str):
        wanted = _listed(classes)
        missing = sorted({*wanted} - {*class_ids})
        if missing:
            raise UserError(f"data.classes={classes} lists {len(wanted)} classes, of which this data lacks "
                            f"{len(missing)}, such as {missing[0]}.{did_you_mean(missing[0], class_ids)}")
        return [name for name in class_ids if name in wanted]
    if not 2 <= classes <= len(class_ids):
        raise UserError(f"data.classes={classes}: this data has {len(class_ids)} classes; give 2 to {len(class_ids)}.")
    return class_ids[:classes]


def _listed(name: str) -> list[str]:
    """The words of a list of classes; lines that start with # are remarks."""
    path = IMAGENET100 if name == IMAGENET100.stem else Path(name).expanduser()
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.classes={name} is no number, nor a readable list of class folders "
                        f"({getattr(error, 'strerror', None) or 'not text'}): give imagenet100 or a file.") from None
    words = [word for line in lines if not line.startswith("#") for word in line.split()]
    if len({*words}) < max(2, len(words)):
        raise UserError(f"data.classes={name} lists {len({*words})} different classes in {len(words)} words: list two "
                        f"or more, each once.")
    return words
