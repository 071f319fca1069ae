"""`load(source, ...)`: the data sets by name, cut to a fraction or to the first classes where asked."""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from deepvit.data.decode import resolve_decoder
from deepvit.data.exclude import without, without_one
from deepvit.data.folders import (
    check_has_classes,
    check_same_classes,
    class_folders,
    existing,
    find_splits,
    readable_names,
)
from deepvit.data.imageset import IN_MEMORY_MB, ArraySet, FileSet, ImageSet, Splits, balanced_part, hold_out
from deepvit.data.index import kept_listing
from deepvit.data.listing import KINDS, in_words
from deepvit.data.timm_sets import timm_splits
from deepvit.errors import UserError, did_you_mean

DOWNLOADING = ("cifar10", "cifar100", "timm")  # sources that may have to fetch their pictures
log = logging.getLogger(__name__)
IMAGENET100 = Path(__file__).with_name("imagenet100.txt")


def load(source: str, *, root: str | None = None, fraction: float = 1.0, classes: int | str | None = None,
         val_fraction: float | None = None, seed: int = 0, decoder: str = "auto", in_memory_mb: int = IN_MEMORY_MB,
         name: str | None = None, train_split: str = "train", val_split: str = "validation",
         exclude: str | None = None) -> Splits:
    """A data set by its source.

    Args:
        source: `digits`, `imagenet`, `folder`, `cifar10`, `cifar100` or `timm`.
        root: folder of the pictures; not for `digits`.
        fraction: a fixed, class-balanced part of the training pictures, in (0, 1].
        classes: only the first k classes, or those in a list: a file of their folder names, or `imagenet100`.
        val_fraction: for `folder` without a val/: the fixed, class-balanced part of each class held out.
        seed: of those two choices (not of the training).
        decoder: `auto`, `torchvision` or `pil`.
        in_memory_mb: a folder whose decoded pictures need less is kept in memory.
        exclude: file with the names of images to leave out, as `deepvit check` writes it.
        name, train_split, val_split: of a timm data set (`hfds/...`, `wds/...`, `torch/...`, or tar files in `root`).
    Raises:
        UserError for everything that is wrong with the folder or the arguments.
    """
    if source not in SOURCES:
        raise UserError(f"data.source={source} is none of {', '.join(SOURCES)}.{did_you_mean(source, SOURCES)}")
    if not 0 < fraction <= 1:
        raise UserError(f"data.fraction={fraction} must be above 0 and at most 1.")
    arguments = {"root": root, "val_fraction": val_fraction, "seed": seed, "decoder": resolve_decoder(decoder),
                 "in_memory_mb": in_memory_mb, "classes": classes, "name": name, "train_split": train_split,
                 "val_split": val_split}
    if source != "timm" and (name, train_split, val_split) != (None, "train", "validation"):
        raise UserError(f"data.name, data.train_split and data.val_split are for data=timm, not for data={source}.")
    splits = _first_classes(SOURCES[source](**arguments), classes)
    if exclude is not None:
        splits = without(splits, exclude, root)
    if len(splits.class_ids) < 2:
        raise UserError(f"data.root={root} has one class only, '{splits.class_ids[0]}', so nothing can be learned: is "
                        f"it one level too high? Each class needs a folder below it, or below train/ and val/.")
    if fraction < 1:
        splits = replace(splits, train=splits.train.take(balanced_part(splits.train.targets, fraction, seed)))
    return splits


def eval_folder(root: str, class_ids: list[str], *, decoder: str = "auto", in_memory_mb: int = IN_MEMORY_MB,
                exclude: str | None = None) -> ImageSet:
    """A folder of classes for evaluation alone, e.g. ImageNet-V2: targets are the places of its names in `class_ids`.

    root: the class folders, or a folder whose val/ (or test/) holds them. Folders named 0 .. C-1 are the classes by
    number. Some classes may be missing; a folder that is none of `class_ids` is refused by a UserError.
    """
    path = existing(root, "folder")
    train, val = find_splits(path, class_ids)
    if train is not None and val is None:
        raise UserError(f"data.root={root} has {train.name}/ but no val/ folder: give data.root={train} to evaluate on "
                        f"the training images.")
    path = val or path
    names = class_folders(path)
    check_has_classes(path, names)
    if names == [str(number) for number in range(len(class_ids))]:
        wanted = np.arange(len(names))
    else:
        strangers = [name for name in names if name not in class_ids]
        if strangers:
            raise UserError(f"{path} has {len(strangers)} class folders that the model was not trained on "
                            f"({', '.join(strangers[:3])}).{did_you_mean(strangers[0], class_ids)}")
        wanted = np.array([class_ids.index(name) for name in names])
    images = _file_set(path, names, decoder=resolve_decoder(decoder), in_memory_mb=in_memory_mb, labels=wanted)
    return images if exclude is None else without_one(images, class_ids, exclude, root)


def every_set(source: str, root: str, **options: object) -> list[ImageSet]:
    """All that `source` has, whether it could be trained on or not: of folders each split that is there."""
    if source not in ("folder", "imagenet"):
        splits = load(source, root=root, **options)
        return [splits.train, splits.val]
    path = existing(root, source)
    sets = []
    for folder in [split for split in find_splits(path) if split] or [path]:
        classes = class_folders(folder)
        check_has_classes(folder, classes)
        sets.append(_file_set(folder, classes, decoder=resolve_decoder(options["decoder"]), in_memory_mb=0))
    return sets


def _file_set(folder: Path, classes: list[str], **options: object) -> FileSet:
    """The images below `folder/<class>`; what is left out there is said."""
    listing = kept_listing(folder, classes)
    if listing.left_out:
        log.warning("In %s %s Images are %s.", folder, in_words(listing.left_out), KINDS)
    if listing.is_nested:
        log.warning("No class folder of %s has images itself, only folders of them: is data.root one level too high?",
                    folder)
    return FileSet(folder, classes, listing, **options)


def _first_classes(splits: Splits, classes: int | str | None) -> Splits:
    kept = chosen(classes, splits.class_ids)
    if kept == splits.class_ids:
        return splits
    places = np.array([kept.index(name) if name in kept else -1 for name in splits.class_ids])
    names = [name for name, place in zip(splits.class_names, places, strict=True) if place >= 0]
    return Splits(*(_relabelled(part, places) for part in (splits.train, splits.val)), names, kept)


def _relabelled(images: ImageSet, places: np.ndarray) -> ImageSet:
    """Images of the classes that have a place, which becomes their target."""
    part = images.take(np.flatnonzero(places[images.targets] >= 0))
    part.targets = places[part.targets]
    return part


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
    if len({*words}) < 2 or len({*words}) < len(words):
        raise UserError(f"data.classes={name} lists {len({*words})} different classes in {len(words)} words: list two "
                        f"or more, each once.")
    return words


def _digits(*, root: str | None, val_fraction: float | None, decoder: str, **_: object) -> Splits:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels; always the same 1437 / 360."""
    if root or val_fraction:
        raise UserError("data=digits is built in and takes no data.root or data.val_fraction: for your own pictures "
                        "use recipe=imagenet or data=folder.")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]; sklearn's values run from 0 to 16
    pixels = np.repeat(grey[..., None], 3, axis=-1)
    parts = train_test_split(np.arange(len(grey)), test_size=360, stratify=digits.target, random_state=0)
    names = [str(name) for name in digits.target_names]
    sets = [ArraySet(pixels[part], digits.target[part], "digits", decoder=decoder, ids=part)
            for part in map(np.sort, parts)]
    return Splits(*sets, names, names)


def _imagenet(*, root: str | None, val_fraction: float | None, decoder: str, in_memory_mb: int,
              classes: int | str | None, **_: object) -> Splits:
    path = existing(root, "imagenet")
    if val_fraction:
        raise UserError("data=imagenet has its own val/ folder and takes no data.val_fraction: use data=folder.")
    train, val = find_splits(path)
    if train is None or val is None:
        missing = "train/" if train is None else "val/"
        raise UserError(f"data.root={root} has no {missing} folder: data=imagenet wants train/<wnid>/*.JPEG and "
                        "val/<wnid>/*.JPEG (data=folder is for other folders).")
    return _two_folders(train, val, decoder=decoder, in_memory_mb=in_memory_mb, classes=classes)


def _folder(*, root: str | None, val_fraction: float | None, decoder: str, in_memory_mb: int, seed: int,
            classes: int | str | None, **_: object) -> Splits:
    path = existing(root, "folder")
    train, val = find_splits(path)
    options = {"decoder": decoder, "in_memory_mb": in_memory_mb}
    if val is not None and train is None:
        raise UserError(f"data.root={root} has {val.name}/ but no train/ folder.")
    if not val_fraction:
        if val is not None:
            return _two_folders(train, val, classes=classes, **options)
        check_has_classes(train or path, class_folders(train or path))
        raise UserError(f"{path} has no val/ folder: give data.val_fraction=0.1 to hold out a tenth of each class.")
    if val is not None and class_folders(val):
        raise UserError(f"data.root={root} has {val.name}/, which data.val_fraction={val_fraction} would not use: "
                        f"leave data.val_fraction out, or give data.root={train} to hold out a part of the "
                        f"training images.")
    if val is not None:
        log.warning("%s has no class folders and is not used.", val)
    return _held_out(train or path, val_fraction, seed, **options)


def _two_folders(train: Path, val: Path, *, classes: int | str | None, **options: object) -> Splits:
    ids, val_ids = class_folders(train), class_folders(val)
    check_has_classes(train, ids)
    check_has_classes(val, val_ids)
    check_same_classes(ids, val_ids, train, val)
    ids = chosen(classes, ids)  # no time is spent on folders that are not used
    return Splits(_file_set(train, ids, **options), _file_set(val, ids, **options), readable_names(ids), ids)


def _held_out(folder: Path, val_fraction: float, seed: int, **options: object) -> Splits:
    ids = class_folders(folder)
    check_has_classes(folder, ids)
    return hold_out(_file_set(folder, ids, **options), ids, val_fraction, seed, str(folder))


def _cifar(classes_of_it: int, *, root: str | None, val_fraction: float | None, decoder: str,
           **options: object) -> Splits:
    name = f"cifar{classes_of_it}"
    if not root:
        raise UserError(f"data={name} needs data.root: the folder that holds it as JPEGs ({{train,test}}/<class>/) or "
                        "that torchvision shall download it to.")
    path = Path(root).expanduser()
    if path.is_dir() and find_splits(path)[0] is not None:
        return _folder(root=root, val_fraction=val_fraction, decoder=decoder, **options)
    if val_fraction:
        raise UserError(f"data.val_fraction={val_fraction} is for folders without a val/ or test/: torchvision's "
                        f"{name} has its own test images, so leave it out.")
    from torchvision.datasets import CIFAR10, CIFAR100
    existed = path.exists()
    dataset = {10: CIFAR10, 100: CIFAR100}[classes_of_it]
    try:
        parts = [dataset(path, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        if not existed:
            with suppress(OSError):
                path.rmdir()  # only where it is empty
        raise UserError(f"data.root={root} holds neither train/<class>/ and test/<class>/ with JPEGs nor torchvision's "
                        f"{dataset.base_folder}/, and {dataset.__name__} could not be downloaded to it "
                        f"({error}).") from error
    sets = [ArraySet(part.data, np.array(part.targets), f"{name}/{split}", decoder=decoder)
            for part, split in zip(parts, ("train", "test"), strict=True)]
    return Splits(*sets, parts[0].classes, parts[0].classes)


SOURCES: dict[str, Callable[..., Splits]] = {
    "digits": _digits, "imagenet": _imagenet, "folder": _folder, "cifar10": partial(_cifar, 10),
    "cifar100": partial(_cifar, 100), "timm": timm_splits,
}
