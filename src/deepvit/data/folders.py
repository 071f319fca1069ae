"""Folders of classes and of splits, and one sentence for each way in which a folder can be wrong."""

import logging
import os
import re
import stat
from collections.abc import Collection, Sequence
from pathlib import Path

from deepvit.data.listing import Walk, entries, is_folder, leads_nowhere
from deepvit.errors import UserError

TRAIN, VAL = ("train", "training"), ("val", "valid", "validation", "test", "eval")
VALPREP = "https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/valprep.sh"
log = logging.getLogger(__name__)


def existing(root: str | None, source: str) -> Path:
    """The data folder, or a UserError that says what is missing."""
    if not root:
        raise UserError(f"data={source} needs the folder of the images: give data.root=/path/to/it.")
    path = Path(root).expanduser()
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"data.root={root} does not exist.") from error
    except OSError as error:
        raise UserError(f"data.root={root} cannot be read ({error.strerror}).") from error
    if not stat.S_ISDIR(mode):
        raise UserError(f"data.root={root} is a file, not a folder of images.")
    entries(path)
    return path


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted; by number where all are numbers (ImageNet-V2), hidden ones left out.

    Raises UserError for a link that leads nowhere: a class would be missing in silence.
    """
    found = [entry for entry in entries(folder) if not entry.name.startswith(".")]
    dead = next((entry for entry in found if leads_nowhere(entry)), None)
    if dead is not None:
        raise UserError(f"The link {dead.path} leads nowhere, and may stand for a class: mend or remove it.")
    names = [entry.name for entry in found if is_folder(entry)]
    return sorted(names, key=int) if names and all(name.isdecimal() for name in names) else sorted(names)


def find_splits(root: Path, known: Collection[str] = ()) -> tuple[Path | None, Path | None]:
    """The folders (train, val) in `root`, each None where there is none; both where `root` holds the classes.

    A folder called like a split is one, unless it stands among folders of images and holds no folders itself (a class
    of vehicles may be called `train`).

    Args:
        known: classes that a model was trained on; folders called like these only are taken for the classes.
    Raises:
        UserError: both readings are possible.
    """
    names = class_folders(root)
    called = [name for name in (*TRAIN, *VAL) if name in names]
    below = {name: class_folders(root / name) for name in called}
    train, val = (next((name for name in split if name in called), None) for split in (TRAIN, VAL))
    others = [name for name in names if name not in called and _has_images(root / name)] if called else []
    are_known, are_flat = {*names} <= {*known}, not any(below.values())
    if (are_known or are_flat) and (others or are_known and are_flat):
        return None, None
    are_alike = None not in (train, val) and below[train] and below[train] == below[val]
    if others and not are_alike:
        raise UserError(f"{root} holds folders called like splits ({some(called)}) beside others with images "
                        f"({some(others)}): if all are classes, move them into a folder {root / 'train'} of their own; "
                        f"else give data.root a folder that holds the splits alone.")
    unused = [name for name in (*called, *others) if name not in (train, val)]
    if unused:
        log.warning("Not used of %s: %s.", root, some(unused))
    return train and root / train, val and root / val


def _has_images(folder: Path) -> bool:
    try:
        return any(True for _ in Walk().images(os.fsencode(folder)))
    except UserError:  # such as lost+found/ beside the splits
        return False


def check_same_classes(train: list[str], val: list[str], train_folder: Path, val_folder: Path) -> None:
    """UserError that names the difference, if the two splits do not have the same class folders."""
    only_train, only_val = sorted({*train} - {*val}), sorted({*val} - {*train})
    if only_train or only_val:
        parts = [f"{len(names)} only in {folder} ({some(names)})"
                 for names, folder in ((only_train, train_folder), (only_val, val_folder)) if names]
        raise UserError(f"Training and validation have different classes: {' and '.join(parts)}. Both need a folder "
                        f"for each class.")


def classes_of(folder: Path) -> list[str]:
    """`class_folders`; UserError where there are none; a flat ImageNet val/ gets its own sentence."""
    if classes := class_folders(folder):
        return classes
    files = [entry.name for entry in entries(folder) if not entry.name.startswith(".")]
    if any(re.match(r"ILSVRC2012_val_\d+", name) for name in files):
        raise UserError(f"{folder} is flat (ILSVRC2012_val_*.JPEG without class folders): sort it into the 1000 wnid "
                        f"folders once, from inside it, with `wget -qO- {VALPREP} | bash`.")
    what = f"{len(files)} files but no folder of a class" if files else "nothing"
    raise UserError(f"{folder} has {what} in it: it should hold a folder for each class, with its images inside.")


def printable(name: str) -> str:
    """A file's name with replacement signs for what is not UTF-8 in it, which can be neither drawn nor encoded."""
    return os.fsencode(name).decode("utf-8", "replace")


def readable_names(class_ids: list[str]) -> list[str]:
    """Folder names -> names for people: the first lemmas of an ImageNet wnid (timm's list), others printable."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in class_ids):
        return [printable(name) for name in class_ids]
    from timm.data import ImageNetInfo
    info = ImageNetInfo("imagenet-22k")
    known = {*info.label_names()}
    return [info.label_name_to_description(name) if name in known else name for name in class_ids]


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of them."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
