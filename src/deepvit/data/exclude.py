"""Lists of images to leave out, `data.exclude=FILE`: a name a line, relative to the data's root, and `#` remarks.

A name that a line cannot hold as it is (with a line break, or one that begins like a remark) is written as JSON.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from deepvit.data.folders import some
from deepvit.data.imageset import ImageSet
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


def without(sets: Sequence[ImageSet], class_ids: list[str], file: str, root: str | None, below: str = ""
            ) -> list[ImageSet]:
    """The sets less the images in a list; names that begin with `below` and are in none of them are said.

    Raises UserError for a class that loses all its images.
    """
    names = {name for name in read_list(file, root) if name.startswith(below)}
    unknown, rest = set(names), []
    for images in sets:
        at = images.find(names)
        kept = np.setdiff1d(np.arange(len(images)), at)
        empty = np.setdiff1d(images.targets, images.targets[kept])
        if len(empty):
            raise UserError(f"data.exclude={file} leaves no image of class {class_ids[empty[0]]}: remove the class, or "
                            f"names from the list.")
        rest.append(images.take(kept) if len(at) else images)
        unknown.difference_update(map(images.name, at.tolist()))
    if unknown:
        log.warning("%d of the names in data.exclude=%s are not among the images in use: %s.", len(unknown), file,
                    some(sorted(unknown)))
    return rest
