"""The base class of all data sources, and the lists that select classes and exclude images."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from deepvit.data.decode import resolve_decoder
from deepvit.data.imageset import ImageSet, Splits, balanced_part
from deepvit.errors import UserError, did_you_mean, some

IMAGENET100 = Path(__file__).with_name("imagenet100.txt")
TITLE = "# Images that deepvit check could not use; data.exclude takes this list"
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Source(ABC):
    """A data source with its options. All methods raise UserError for data or options that cannot be used."""

    root: str | None = None  # folder of the images
    fraction: float = 1.0  # a fixed, class-balanced part of the training images, in (0, 1]
    classes: int | str | None = None  # the first k, or those in a list: a file of folder names, or `imagenet100`
    val_fraction: float | None = None  # the fixed, class-balanced part of each class held out
    seed: int = 0  # of these two choices, not of the training
    decoder: str = "auto"  # `auto`, `torchvision` or `pil`
    in_memory_mb: int = 512  # a folder whose decoded images fit is decoded once and kept
    exclude: str | None = None  # file with the names of images to leave out, as `deepvit check` writes it
    name: str | None = None  # of a timm data set, as the next two
    train_split: str = "train"
    val_split: str = "validation"

    source: ClassVar[str]  # `data.source`
    title: ClassVar[str] = ""  # in a sentence, if other than `source`
    may_download: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.decoder = resolve_decoder(self.decoder)
        if self.source != "timm" and (self.name, self.train_split, self.val_split) != (None, "train", "validation"):
            raise UserError(f"data.name, train_split and val_split are for data=timm, not for data={self.source}.")

    @abstractmethod
    def whole(self) -> Splits:
        """All classes; fewer only where that saves listing them."""

    def sets(self) -> list[ImageSet]:
        """Every image set found, whether or not it can be trained on."""
        splits = self.splits()
        return [splits.train, splits.val]

    def splits(self) -> Splits:
        """The training and validation sets that the options select."""
        splits = self.whole()
        kept = chosen(self.classes, splits.class_ids)
        if kept != splits.class_ids:
            numbers = np.flatnonzero(np.isin(splits.class_ids, kept))
            parts = [images.take(np.flatnonzero(np.isin(images.targets, numbers)))
                     for images in (splits.train, splits.val)]
            for part in parts:
                part.targets = np.searchsorted(numbers, part.targets)
            splits = Splits(*parts, kept)
        if self.exclude is not None:
            splits = Splits(*without([splits.train, splits.val], splits.class_ids, self.exclude, self.root), kept)
        if len(splits.class_ids) < 2:
            raise UserError(f"data.root={self.root} has one class only, '{kept[0]}': is it one level too high? Give "
                            f"the folder that has a folder for each class, or train/ and val/ with those.")
        if self.fraction < 1:
            part = balanced_part(splits.train.targets, self.fraction, self.seed)
            splits = replace(splits, train=splits.train.take(part))
        return splits

    def hold_out(self, images: ImageSet, class_ids: list[str], where: str) -> Splits:
        """`val_fraction` of each class for validation, the rest for training."""
        held = balanced_part(images.targets, self.val_fraction, self.seed)
        rest = np.setdiff1d(np.arange(len(images)), held)
        left = np.bincount(images.targets[rest], minlength=len(class_ids))
        if not left.all():
            raise UserError(f"data.val_fraction={self.val_fraction} leaves class {class_ids[left.argmin()]} of {where} "
                            f"without training images: lower it, or give that class two images or more.")
        return Splits(images.take(rest), images.take(held), class_ids)


def chosen(classes: int | str | None, class_ids: list[str]) -> list[str]:
    """The classes that `data.classes` selects, in the same order. Lines of its lists that start with # are comments."""
    if classes is None:
        return class_ids
    if isinstance(classes, int):
        if not 2 <= classes <= len(class_ids):
            raise UserError(f"data.classes={classes}: this data has {len(class_ids)} classes; give 2 or more of them.")
        return class_ids[:classes]
    path = IMAGENET100 if classes == IMAGENET100.stem else Path(classes).expanduser()
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.classes={classes} cannot be read ({getattr(error, 'strerror', None) or 'not text'}): "
                        f"give a number, imagenet100, or a file that lists class folders.") from None
    words = [word for line in lines if not line.startswith("#") for word in line.split()]
    if len({*words}) < max(2, len(words)):
        raise UserError(f"data.classes={classes} must list two classes or more, each once.")
    if missing := sorted({*words} - {*class_ids}):
        raise UserError(f"data.classes={classes} lists {len(words)} classes, and this data lacks {len(missing)}, "
                        f"such as {missing[0]}.{did_you_mean(missing[0], class_ids)}")
    return [name for name in class_ids if name in words]


def read_list(file: str, root: str | None) -> set[str]:
    """The names in a list for `data.exclude`, as `ImageSet.name` gives them: a name a line, relative to the data's root
    (as JSON where it would not hold in one), and comments that start with #. UserError where it cannot be read."""
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        names = [json.loads(line) if line.startswith('"') else line for line in map(str.rstrip, lines)
                 if line and not line.startswith("#")]
    except (OSError, ValueError) as error:
        raise UserError(f"data.exclude={file} cannot be read as a list of images ({error}).") from error
    return {str(Path(root or "").expanduser() / name) for name in names}


def write_list(file: Path, bad: Iterable[tuple[str, str]], root: str) -> None:
    """(name, reason) of each image; what is not below `root` keeps its whole name."""
    lines = [TITLE]
    for name, reason in bad:
        name = name.removeprefix(f"{Path(root).expanduser()}/")
        is_plain = name == name.strip() and name[0] not in '#"' and not {*"\r\n"} & {*name}
        lines += [f"# {' '.join(reason.split())}", name if is_plain else json.dumps(name)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")


def without(sets: Sequence[ImageSet], class_ids: list[str], file: str, root: str | None, below: str = ""
            ) -> list[ImageSet]:
    """The sets less the images in a list; logs its names `below` that no set has. UserError for a class left empty."""
    names = {name for name in read_list(file, root) if name.startswith(below)}
    unknown, rest = set(names), []
    for images in sets:
        at = [index for index in range(len(images)) if images.name(index) in names]
        kept = np.setdiff1d(np.arange(len(images)), at)
        empty = np.setdiff1d(images.targets, images.targets[kept])
        if len(empty):
            raise UserError(f"data.exclude={file} leaves no image of class {class_ids[empty[0]]}: shorten the list.")
        rest.append(images.take(kept) if at else images)
        unknown.difference_update(map(images.name, at))
    if unknown:
        log.warning("%d of the names in data.exclude=%s are not among the images in use: %s.", len(unknown), file,
                    some(sorted(unknown)))
    return rest


def refuse_other_classes(train: list[str], val: list[str], *places: Path | str) -> None:
    """UserError unless training and validation, which are at these places, have the same classes in the same order."""
    sides = zip((sorted({*train} - {*val}), sorted({*val} - {*train})), places, strict=True)
    alone = [f"{len(names)} only in {where} ({some(names)})" for names, where in sides if names]
    if train != val:
        raise UserError(f"Training and validation need the same classes: {' and '.join(alone) or 'in one order'}.")
