"""Folders of classes on disk -> file sets, and one sentence for each way in which a folder can be wrong."""

import os
import re
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from deepvit.errors import UserError

EXTENSIONS = tuple(extension.encode() for extension in IMG_EXTENSIONS)
VALPREP = "https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/valprep.sh"


def existing(root: str | None, source: str) -> Path:
    """The data folder, or a UserError that says what is missing."""
    if not root:
        raise UserError(f"data={source} needs the folder of the pictures: give data.root=/path/to/it.")
    path = Path(root).expanduser()
    if not path.exists():
        raise UserError(f"data.root={root} does not exist.")
    if not path.is_dir():
        raise UserError(f"data.root={root} is a file, not a folder of pictures.")
    try:
        next(os.scandir(path), None)
    except OSError as error:
        raise UserError(f"data.root={root} cannot be read ({error.strerror}).") from error
    return path


def split_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    """The first of `root/<names>` that is a folder."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted; by number where all are numbers (ImageNet-V2), hidden ones left out."""
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(names, key=int) if names and all(name.isdecimal() for name in names) else sorted(names)


def scan(folder: Path, classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Picture files below each class folder -> (names 'S' [n] relative to the class folder, targets int64 [n]).

    Symbolic links are followed, hidden files left out, extensions as torchvision's. Raises UserError for a class
    without pictures.
    """
    names, counts = [], []
    for name in classes:
        found = sorted(_pictures(os.fsencode(folder / name), b"", frozenset()))
        if not found:
            kinds = " ".join(extension.decode() for extension in EXTENSIONS)
            raise UserError(f"The class folder {folder / name} has no pictures ({kinds}): add some or remove it.")
        names.append(np.array(found, dtype=bytes))
        counts.append(len(found))
    return np.concatenate(names), np.repeat(np.arange(len(classes)), counts)


def _pictures(folder: bytes, prefix: bytes, above: frozenset[bytes]) -> list[bytes]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder above itself
        return []
    found = []
    for entry in os.scandir(folder):
        if entry.name.startswith(b"."):
            continue
        if entry.name.lower().endswith(EXTENSIONS):
            found.append(prefix + entry.name)
        elif entry.is_dir():
            found += _pictures(entry.path, prefix + entry.name + b"/", above | {real})
    return found


def check_same_classes(train: list[str], val: list[str], train_folder: Path, val_folder: Path) -> None:
    """UserError that names the difference, if the two splits do not have the same class folders."""
    only_train, only_val = sorted({*train} - {*val}), sorted({*val} - {*train})
    if only_train or only_val:
        parts = [f"{len(names)} only in {folder} ({_some(names)})"
                 for names, folder in ((only_train, train_folder), (only_val, val_folder)) if names]
        raise UserError(f"Training and validation have different classes: {' and '.join(parts)}. Both need a folder "
                        f"for each class.")


def check_has_classes(folder: Path, classes: list[str]) -> None:
    """UserError if a folder that should hold class folders holds none; a flat ImageNet val/ gets its own sentence."""
    if classes:
        return
    files = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")]
    if any(re.match(r"ILSVRC2012_val_\d+", name) for name in files):
        raise UserError(f"{folder} is flat (ILSVRC2012_val_*.JPEG without class folders): sort it into the 1000 wnid "
                        f"folders once, from inside it, with `wget -qO- {VALPREP} | bash`.")
    what = f"{len(files)} files but no folder of a class" if files else "nothing"
    raise UserError(f"{folder} has {what} in it: it should hold a folder for each class, with its pictures "
                    f"inside.")


def readable_names(class_ids: list[str]) -> list[str]:
    """Folder names -> names for people: the first lemmas of an ImageNet wnid (timm's list), others unchanged."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in class_ids):
        return list(class_ids)
    from timm.data import ImageNetInfo
    info = ImageNetInfo("imagenet-22k")
    known = {*info.label_names()}
    return [info.label_name_to_description(name) if name in known else name for name in class_ids]


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
