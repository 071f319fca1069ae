"""The sources of images by name; timm's is in `timm_sets.py`."""

import logging
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import numpy as np

from deepvit.config.settings import Data
from deepvit.data.decode import resolve_decoder
from deepvit.data.exclude import without
from deepvit.data.folders import check_same_classes, class_folders, classes_of, existing, find_splits, readable_names
from deepvit.data.imageset import IN_MEMORY_MB, ArraySet, FileSet, ImageSet, Splits
from deepvit.data.index import kept_listing
from deepvit.data.listing import KINDS, in_words
from deepvit.data.source import Source, chosen
from deepvit.data.timm_sets import Timm
from deepvit.errors import UserError, did_you_mean

log = logging.getLogger(__name__)


def load(source: str, **asked: object) -> Splits:
    """A data set by its source; `asked`: the fields of `Source`. Raises UserError for all that is wrong with it."""
    return _kind(source)(**asked).splits()


def source_of(data: Data) -> Source:
    """What the settings ask for."""
    return _kind(data.source)(**{one.name: getattr(data, one.name) for one in fields(Source) if one.name != "seed"})


def _kind(source: str) -> type[Source]:
    if source not in SOURCES:
        raise UserError(f"data.source={source} is none of {', '.join(SOURCES)}.{did_you_mean(source, SOURCES)}")
    return SOURCES[source]


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
    names = classes_of(path)
    if names == [str(number) for number in range(len(class_ids))]:
        wanted = np.arange(len(names))
    else:
        strangers = [name for name in names if name not in class_ids]
        if strangers:
            raise UserError(f"{path} has {len(strangers)} class folders that the model was not trained on "
                            f"({', '.join(strangers[:3])}).{did_you_mean(strangers[0], class_ids)}")
        wanted = np.array([class_ids.index(name) for name in names])
    images = _file_set(path, names, decoder=resolve_decoder(decoder), in_memory_mb=in_memory_mb, labels=wanted)
    return images if exclude is None else without([images], class_ids, exclude, root, f"{path}/")[0]


def _file_set(folder: Path, classes: list[str], **options: object) -> FileSet:
    """The images below `folder/<class>`; what is left out there is said."""
    listing = kept_listing(folder, classes)
    if listing.left_out:
        log.warning("In %s %s Images are %s.", folder, in_words(listing.left_out), KINDS)
    if listing.is_nested:
        log.warning("No class folder of %s has images itself, only folders of them: is data.root one level too high?",
                    folder)
    return FileSet(folder, classes, listing, **options)


class Digits(Source):
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels; always the same 1437 / 360."""

    source = "digits"
    title = "the built-in digits (recipe= chooses others)"

    def whole(self) -> Splits:
        if self.root or self.val_fraction:
            raise UserError(f"data.root={self.root} or data.val_fraction={self.val_fraction} is given, but the digits "
                            f"are built in: to train on your images add recipe=imagenet (train/ and val/ folders of "
                            f"classes), recipe=cifar10 or recipe=folder.")
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        digits = load_digits()
        grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]; sklearn's values run from 0 to 16
        pixels = np.repeat(grey[..., None], 3, axis=-1)
        parts = train_test_split(np.arange(len(grey)), test_size=360, stratify=digits.target, random_state=0)
        names = [str(name) for name in digits.target_names]
        sets = [ArraySet(pixels[part], digits.target[part], "digits", decoder=self.decoder, ids=part)
                for part in map(np.sort, parts)]
        return Splits(*sets, names, names)


class Folder(Source):
    """root/{train,val}/<class>/*, or root/<class>/* of which `val_fraction` is held out."""

    source = "folder"
    has_class_folders = True

    def whole(self) -> Splits:
        path = existing(self.root, "folder")
        train, val = find_splits(path)
        if val is not None and train is None:
            raise UserError(f"data.root={self.root} has {val.name}/ but no train/ folder.")
        if not self.val_fraction:
            if val is not None:
                return self._two(train, val)
            classes_of(train or path)
            raise UserError(f"{path} has no val/ folder: give data.val_fraction=0.1 to hold out a tenth of each class.")
        if val is not None and class_folders(val):
            raise UserError(f"data.root={self.root} has {val.name}/, which data.val_fraction={self.val_fraction} would "
                            f"not use: leave data.val_fraction out, or give data.root={train} to hold out a part of "
                            f"the training images.")
        if val is not None:
            log.warning("%s has no class folders and is not used.", val)
        folder = train or path
        ids = classes_of(folder)
        return self.hold_out(self._images(folder, ids), ids, str(folder))

    def sets(self) -> list[ImageSet]:
        path = existing(self.root, self.source)
        return [self._images(folder, classes_of(folder))
                for folder in [split for split in find_splits(path) if split] or [path]]

    def _two(self, train: Path, val: Path) -> Splits:
        ids, val_ids = classes_of(train), classes_of(val)
        check_same_classes(ids, val_ids, train, val)
        ids = chosen(self.classes, ids)  # no time is spent on folders that are not used
        return Splits(self._images(train, ids), self._images(val, ids), readable_names(ids), ids)

    def _images(self, folder: Path, ids: list[str]) -> FileSet:
        return _file_set(folder, ids, decoder=self.decoder, in_memory_mb=self.in_memory_mb)


class ImageNet(Folder):
    """root/train/<wnid>/*.JPEG and root/val/<wnid>/*.JPEG."""

    source = "imagenet"

    def whole(self) -> Splits:
        path = existing(self.root, "imagenet")
        if self.val_fraction:
            raise UserError("data=imagenet has its own val/ folder and takes no data.val_fraction: use data=folder.")
        train, val = find_splits(path)
        if train is None or val is None:
            missing = "train/" if train is None else "val/"
            raise UserError(f"data.root={self.root} has no {missing} folder: data=imagenet wants train/<wnid>/*.JPEG "
                            f"and val/<wnid>/*.JPEG (data=folder is for other folders).")
        return self._two(train, val)


class Cifar10(Source):
    """root/{train,test}/<class>/*, or torchvision's, which is downloaded to `root` where it is not there."""

    source = "cifar10"
    may_download = True

    def whole(self) -> Splits:
        if not self.root:
            raise UserError(f"data={self.source} needs data.root: the folder that holds it as JPEGs "
                            f"({{train,test}}/<class>/) or that torchvision shall download it to.")
        path = Path(self.root).expanduser()
        if path.is_dir() and find_splits(path)[0] is not None:
            return Folder(**vars(self)).whole()
        if self.val_fraction:
            raise UserError(f"data.val_fraction={self.val_fraction} is for folders without a val/ or test/: "
                            f"torchvision's {self.source} has its own test images, so leave it out.")
        parts = self._downloaded(path)
        sets = [ArraySet(part.data, np.array(part.targets), f"{self.source}/{split}", decoder=self.decoder)
                for part, split in zip(parts, ("train", "test"), strict=True)]
        return Splits(*sets, parts[0].classes, parts[0].classes)

    def _downloaded(self, path: Path) -> list:
        from torchvision import datasets
        existed, dataset = path.exists(), getattr(datasets, self.source.upper())
        try:
            return [dataset(path, train=train, download=True) for train in (True, False)]
        except (OSError, RuntimeError) as error:
            if not existed:
                with suppress(OSError):
                    path.rmdir()  # only where it is empty
            raise UserError(f"data.root={self.root} holds neither train/<class>/ and test/<class>/ with JPEGs nor "
                            f"torchvision's {dataset.base_folder}/, and {dataset.__name__} could not be downloaded to "
                            f"it ({error}).") from error


class Cifar100(Cifar10):
    source = "cifar100"


SOURCES: dict[str, type[Source]] = {kind.source: kind for kind in (Digits, ImageNet, Folder, Cifar10, Cifar100, Timm)}
