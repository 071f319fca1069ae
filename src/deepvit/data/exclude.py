"""Lists of images to leave out, `data.exclude=FILE`: a name a line, relative to the data's root, and `#` remarks.

A name that a line cannot hold as it is (with a line break, or one that begins like a remark) is written as JSON.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from deepvit.data.folders import some
from deepvit.data.imageset import FileSet, ImageSet, Splits
from deepvit.errors import UserError

log = logging.getLogger(__name__)
TITLE = "# Images that deepvit check could not use; data.exclude takes this list"


def read_list(file: str, root: str | None) -> set[str]:
    """The names in a list, as `ImageSet.name` gives them. Raises UserError where the file cannot be read."""
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


def without(splits: Splits, file: str, root: str | None) -> Splits:
    """The splits less the images in a list; names that are in neither are said."""
    names = read_list(file, root)
    train, val = (_rest(images, names, splits.class_ids, file) for images in (splits.train, splits.val))
    _say_unknown(file, names - train[1] - val[1])
    return replace(splits, train=train[0], val=val[0])


def without_one(images: FileSet, class_ids: list[str], file: str, root: str) -> ImageSet:
    """One folder's images less those in a list; names below it that are not there are said."""
    names = {name for name in read_list(file, root) if name.startswith(f"{images.root}/")}
    rest, found = _rest(images, names, class_ids, file)
    _say_unknown(file, names - found)
    return rest


def _rest(images: ImageSet, names: set[str], class_ids: list[str], file: str) -> tuple[ImageSet, set[str]]:
    """(images not named, names found). Raises UserError for a class that loses all its images."""
    at = images.find(names)
    kept = np.setdiff1d(np.arange(len(images)), at)
    empty = np.setdiff1d(images.targets, images.targets[kept])
    if len(empty):
        raise UserError(f"data.exclude={file} leaves no image of class {class_ids[empty[0]]}: remove the class, or "
                        f"names from the list.")
    return images.take(kept) if len(at) else images, {images.name(index) for index in at.tolist()}


def _say_unknown(file: str, names: set[str]) -> None:
    if names:
        log.warning("%d of the names in data.exclude=%s are not in the data: %s.", len(names), file,
                    some(sorted(names)))
