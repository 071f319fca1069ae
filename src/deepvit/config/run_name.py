"""Where a run lives: a pure function of what changes its results, without a clock. Imports nothing heavy."""

import hashlib
import re
from collections.abc import Mapping, Sequence

NOT_NAMED = ("data.root=", "data.workers=", "engine", "fresh=", "dry=", "logger=", "hydra", "sweep=")
LONGEST = 120  # characters of a folder's name


def run_folder(root: str, choices: Mapping[str, str], overrides: Sequence[str]) -> str:
    """`<root>/<recipe>/<model>/<name>`: the same command gives the same folder, so it continues the same run.

    Args:
        root: `runs`, or empty for a path below it.
        choices: the chosen name of each config group.
        overrides: as on the command line, e.g. `["model=deepvit32", "seed=1"]`.
    """
    parts = (root, choices["recipe"], choices["model"], run_name(overrides))
    return "/".join(part for part in parts if part)


def run_name(overrides: Sequence[str]) -> str:
    """The sorted overrides that change results, in `[A-Za-z0-9._=-]`; hashed where that would lose or exceed.

    >>> run_name(["seed=1", "model=vit16", "engine.devices=2"])
    'model=vit16-seed=1'
    """
    named = sorted(word for word in (override.lstrip("+") for override in overrides)
                   if not word.lstrip("~").startswith(NOT_NAMED))
    exact = "-".join(named)
    key_slashes = "-".join("=".join((word.split("=", 1)[0].replace("/", "-"), *word.split("=", 1)[1:]))
                           for word in named)  # model/attention=self: a slash in a key is no loss
    name = re.sub(r"[^A-Za-z0-9._=-]", "-", key_slashes)
    if name != key_slashes or len(name) > LONGEST:
        name = f"{name[:LONGEST - 9]}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"
    return name or "default"
