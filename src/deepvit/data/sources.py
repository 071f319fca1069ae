"""The sources of images by name: folders of classes and of splits, the built-in digits, CIFAR; and timm's."""

import logging
import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import numpy as np

from deepvit.config.settings import Data
from deepvit.data.imageset import ArraySet, FileSet, ImageSet, Splits
from deepvit.data.listing import Walk, class_folders, entries, existing, kept_listing, log_left_out
from deepvit.data.source import Source, chosen, refuse_other_classes, without
from deepvit.data.timm_sets import Timm
from deepvit.errors import UserError, choose, did_you_mean, some

TRAIN, VAL = ("train", "training"), ("val", "valid", "validation", "test", "eval")
VALPREP = "https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/valprep.sh"
log = logging.getLogger(__name__)


def find_splits(root: Path, known: Collection[str] = ()) -> tuple[Path | None, Path | None]:
    """The folders (train, val) in `root`, each None where there is none; both None where `root` holds the classes. A
    folder named like a split is one, unless it stands among folders of images and has no folders in it (a class of
    vehicles may be named `train`), or all are `known` classes of a model. Raises UserError where both are possible."""
    names = class_folders(root)
    called = [name for name in (*TRAIN, *VAL) if name in names]
    below = {name: class_folders(root / name) for name in called}
    train, val = (next((name for name in split if name in called), None) for split in (TRAIN, VAL))
    others = []
    for name in names if called else []:
        with suppress(UserError):  # one that cannot be read, such as lost+found/
            if name not in called and any(True for _ in Walk().images(os.fsencode(root / name))):
                others.append(name)
    are_known, are_flat = {*names} <= {*known}, not any(below.values())
    if (are_known or are_flat) and (others or are_known and are_flat):
        return None, None
    are_alike = None not in (train, val) and below[train] and below[train] == below[val]
    if others and not are_alike:
        raise UserError(f"{root} has folders named like splits ({some(called)}) beside others with images "
                        f"({some(others)}): if all are classes, move them into {root / 'train'}, else take those out.")
    unused = [name for name in (*called, *others) if name not in (train, val)]
    if unused:
        log.warning("Not used of %s: %s.", root, some(unused))
    return train and root / train, val and root / val


def classes_of(folder: Path) -> list[str]:
    """`class_folders`; UserError where there are none; a flat ImageNet val/ gets its own sentence."""
    if classes := class_folders(folder):
        return classes
    files = [entry.name for entry in entries(folder) if not entry.name.startswith(".")]
    if any(re.match(r"ILSVRC2012_val_\d+", name) for name in files):
        raise UserError(f"{folder} is flat (ILSVRC2012_val_*.JPEG): sort it into the 1000 wnid folders once, from "
                        f"inside it, with `wget -qO- {VALPREP} | bash`.")
    what = f"{len(files)} files but no folder of a class" if files else "nothing"
    raise UserError(f"{folder} has {what} in it: it should hold a folder of images for each class.")


class Folder(Source):
    """root/{train,val}/<class>/*, or root/<class>/* of which `val_fraction` is held out."""

    source = "folder"

    def whole(self) -> Splits:
        path = existing(self.root, self.source)
        train, val = find_splits(path)
        if val is not None:
            if train is None:
                raise UserError(f"data.root={self.root} has {val.name}/ but no train/ folder.")
            if not self.val_fraction:
                return self._both(train, val)
            if class_folders(val):
                raise UserError(f"data.root={self.root} has {val.name}/, which data.val_fraction={self.val_fraction} "
                                f"would not use: leave data.val_fraction out, or give data.root={train}.")
            log.warning("%s has no class folders and is not used.", val)
        folder = train or path
        ids = classes_of(folder)
        if not self.val_fraction:
            raise UserError(f"{path} has no val/ folder: give data.val_fraction=0.1 to hold out a tenth of each class.")
        return self.hold_out(self.images(folder, ids), ids, str(folder))

    def sets(self) -> list[ImageSet]:
        path = existing(self.root, self.source)
        folders = [*filter(None, find_splits(path))] or [path]
        return [self.images(folder, classes_of(folder)) for folder in folders]

    def _both(self, train: Path, val: Path) -> Splits:
        ids = classes_of(train)
        refuse_other_classes(ids, classes_of(val), train, val)
        ids = chosen(self.classes, ids)  # no time is spent on folders that are not used
        return Splits(self.images(train, ids), self.images(val, ids), ids)

    def images(self, folder: Path, classes: list[str]) -> FileSet:
        """The images below `folder/<class>`; logs the files that it leaves out."""
        listing = kept_listing(folder, classes)
        log_left_out(folder, listing.left_out)
        if listing.is_nested:
            log.warning("The class folders of %s hold only folders of images: is data.root one level too high?", folder)
        return FileSet(folder, classes, listing, decoder=self.decoder, in_memory_mb=self.in_memory_mb)


class ImageNet(Folder):
    """root/train/<wnid>/*.JPEG and root/val/<wnid>/*.JPEG."""

    source = "imagenet"


class Digits(Source):
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels; always the same 1437 / 360."""

    source = "digits"
    title = "the built-in digits (recipe= chooses others)"

    def whole(self) -> Splits:
        if self.root or self.val_fraction:
            raise UserError("The digits take no data.root or data.val_fraction: add recipe=imagenet or recipe=folder.")
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        digits = load_digits()
        grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]; sklearn's values run from 0 to 16
        pixels = np.repeat(grey[..., None], 3, axis=-1)
        parts = train_test_split(np.arange(len(grey)), test_size=360, stratify=digits.target, random_state=0)
        sets = [ArraySet(pixels[part], digits.target[part], "digits", decoder=self.decoder, ids=part)
                for part in map(np.sort, parts)]
        return Splits(*sets, [str(name) for name in digits.target_names])


class Cifar10(Source):
    """root/{train,test}/<class>/*, or torchvision's, which is downloaded to `root` where it is not there."""

    source = "cifar10"
    may_download = True

    def whole(self) -> Splits:
        if not self.root:
            raise UserError(f"data={self.source} needs data.root: a folder with its images, or one to download to.")
        path = Path(self.root).expanduser()
        if path.is_dir() and find_splits(path)[0] is not None:
            return Folder(**vars(self)).whole()
        if self.val_fraction:
            raise UserError(f"data.val_fraction={self.val_fraction} is not for {self.source}, which has its own test "
                            f"images: leave it out.")
        from torchvision import datasets
        existed, dataset = path.exists(), getattr(datasets, self.source.upper())
        try:
            parts = [dataset(path, train=train, download=True) for train in (True, False)]
        except (OSError, RuntimeError) as error:
            if not existed:
                with suppress(OSError):
                    path.rmdir()  # only where it is empty
            raise UserError(f"data.root={self.root} holds neither train/<class>/ and test/<class>/ with JPEGs nor "
                            f"torchvision's {dataset.base_folder}/, which cannot be downloaded ({error}).") from error
        sets = [ArraySet(part.data, np.array(part.targets), f"{self.source}/{split}", decoder=self.decoder)
                for part, split in zip(parts, ("train", "test"), strict=True)]
        return Splits(*sets, parts[0].classes)


class Cifar100(Cifar10):
    source = "cifar100"


SOURCES: dict[str, type[Source]] = {kind.source: kind for kind in (Digits, ImageNet, Folder, Cifar10, Cifar100, Timm)}


def load(source: str, **asked: object) -> Splits:
    """The splits of a source; `asked`: the fields of `Source`. Raises UserError for data that cannot be used."""
    return choose("data.source", source, SOURCES)(**asked).splits()


def source_of(data: Data) -> Source:
    """The source that the settings describe."""
    asked = {one.name: getattr(data, one.name) for one in fields(Source) if one.name != "seed"}
    return choose("data.source", data.source, SOURCES)(**asked)


def eval_folder(root: str, class_ids: list[str], **asked: object) -> ImageSet:
    """A folder of classes for evaluation alone, e.g. ImageNet-V2: targets are the places of its names in `class_ids`.
    `root` holds the class folders, or a val/ (or test/) that does. Folders named 0 .. C-1 are the classes by number,
    unless the classes have these names. Some classes may be missing; a folder that is none of `class_ids` raises
    UserError. `asked`: fields of `Source`."""
    source, path = Folder(root=root, **asked), existing(root, "folder")
    train, val = find_splits(path, class_ids)
    if train is not None and val is None:
        raise UserError(f"data.root={root} has {train.name}/ but no val/: give data.root={train} to evaluate on that.")
    path = val or path
    names = classes_of(path)
    if names == [str(number) for number in range(len(class_ids))] and {*names} != {*class_ids}:
        class_ids = names
    if unknown := [name for name in names if name not in class_ids]:
        raise UserError(f"{path} has folders of classes that the model was not trained on: {len(unknown)} "
                        f"({some(unknown)}).{did_you_mean(unknown[0], class_ids)}")
    images = source.images(path, names)
    images.targets = np.array([class_ids.index(name) for name in names])[images.targets]
    return images if source.exclude is None else without([images], class_ids, source.exclude, root, f"{path}/")[0]


def real_top1(predictions: np.ndarray, names: Sequence[str], class_ids: Sequence[str]) -> float:
    """Top-1 in percent by ImageNet's reassessed labels (ReaL; Beyer et al., arXiv:2006.07159). `predictions` [n] are
    places in `class_ids`, which are wnids (-1: none), `names` ImageNet's own. Any label is right; images without one
    are left out."""
    from timm.data import ImageNetInfo, RealLabelsImagenet
    numbers = {wnid: number for number, wnid in enumerate(ImageNetInfo().label_names())}
    if strange := [name for name in class_ids if name not in numbers]:
        raise UserError(f"labels=real needs a model of ImageNet's classes, not '{strange[0]}': leave it out.")
    labels = RealLabelsImagenet(filenames=range(50_000)).real_labels  # file name -> classes
    try:
        known = [labels[os.path.basename(name)] for name in names]
    except KeyError as name:
        raise UserError(f"{name} has no ReaL label: those of ImageNet's ILSVRC2012_val_*.JPEG do.") from None
    right = [guess >= 0 and numbers[class_ids[guess]] in any_of
             for guess, any_of in zip(predictions.tolist(), known, strict=True) if any_of]
    if not right:
        raise UserError("None of these images has a ReaL label.")
    return 100.0 * float(np.mean(right))
