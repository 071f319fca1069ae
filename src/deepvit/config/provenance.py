"""Where a number comes from: the command, the code, its libraries, the machine."""

import hashlib
import platform
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepvit.config.run_name import IN_THE_PATH, as_typed, own_choices, run_name
from deepvit.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def origin(config: "DictConfig", hydra: "DictConfig", folder: Path) -> dict[str, Any]:
    """What was chosen and typed for a run of `config` (not yet resolved) in `folder`, and the command that repeats it
    (alone, if it was a cell of a sweep)."""
    chosen = choices_of(hydra)
    words = [word for word in chosen["overrides"] if not word.startswith(("fresh=", "dry="))]
    words += ["hydra.mode=RUN"] if chosen["sweep"] else []  # a sweep's file says MULTIRUN
    if config.engine.threads and not any(word.startswith("engine.threads=") for word in words):
        words.append(f"engine.threads={config.engine.threads}")  # a launcher's choice
    usual = Path("runs", *(str(chosen["choices"].get(group)) for group in IN_THE_PATH), run_name(config, hydra))
    if folder != usual:
        words.append(f"hydra.run.dir={folder}")
    searched = [word for source in hydra.runtime.config_sources if source.provider == "command-line"
                for word in ("--config-dir", source.path)]
    return {**chosen, **preregistration(hydra), "command": shlex.join(["deepvit", "train", *searched, *words])}


def preregistration(hydra: "DictConfig") -> dict[str, Any]:
    """Name and sha256 of the file that said beforehand what a sweep's results are for, where its file names one;
    UserError where it cannot be read."""
    path = ((hydra.callbacks.get("sweep") or {}).get("statistics") or {}).get("preregistered")
    if not path:
        return {}
    try:
        return {"preregistered": {"file": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}}
    except OSError as error:
        raise UserError(f"The sweep was preregistered in {path}, which cannot be read ({error.strerror}): start it in "
                        f"the folder that holds that file.") from None


def choices_of(hydra: "DictConfig") -> dict[str, Any]:
    """Recipe, sweep, the choice of every group of ours, and the overrides as typed."""
    choices = own_choices(hydra)
    return {"recipe": choices.get("recipe"), "sweep": choices.get("sweep"), "choices": choices,
            "overrides": as_typed(hydra.overrides.task)}


def versions() -> dict[str, Any]:
    """Git revision, versions of the libraries, name of the machine."""
    import timm
    import torch
    return {"git": git_revision(), "versions": {"python": platform.python_version(), "torch": torch.__version__,
                                                "timm": timm.__version__}, "host": platform.node()}


@cache
def git_revision() -> str | None:
    """The code's when first asked for, at a run's start, with a + for uncommitted changes; None outside a checkout."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
