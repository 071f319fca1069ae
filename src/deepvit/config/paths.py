"""Paths to nothing, refused before torch is imported: a misspelt folder is answered at once."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepvit.errors import UserError

READ_A_FOLDER = ("folder", "imagenet")  # sources of data; the others may download theirs to `data.root`
SCHEME = re.compile(r"[a-z-]+:")  # of a name that is no path: `timm:vit_small_patch16_224`


def refuse_missing(config: Mapping[str, Any], folder: Path) -> None:
    """
    Args:
        folder: of the run; one that goes on does not read `init` again.
    Raises:
        UserError: `data.root`, `init` or a `checkpoint` is not there.
    """
    data = config.get("data", {})
    source, root = data.get("source"), data.get("root")
    if source in READ_A_FOLDER:
        if not root:
            raise UserError(f"data={source} needs the folder of the images: give data.root=/path/to/it.")
        _refuse("data.root", root)
    goes_on = (folder / "checkpoints" / "last.pt").exists() and not config.get("fresh")
    given = config.get("checkpoint", None if goes_on else config.get("init"))
    for path in [given] if isinstance(given, str) else given if isinstance(given, list) else []:
        _refuse("checkpoint" if "checkpoint" in config else "init", path)


def _refuse(setting: str, path: str) -> None:
    if not SCHEME.match(path) and not os.path.exists(os.path.expanduser(path)):
        raise UserError(f"{setting}={path} does not exist: check the path, which is taken from {Path.cwd()}.")
