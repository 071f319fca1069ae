"""Where a number comes from: code, libraries, machine."""

import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch


def versions() -> dict[str, Any]:
    """Git revision, versions of the libraries, name of the machine."""
    return {"git": git_revision(), "versions": {"python": platform.python_version(), "torch": torch.__version__,
                                                "timm": timm.__version__}, "host": platform.node()}


@cache
def git_revision() -> str | None:
    """Revision of the code when it was first asked for, at the start of a run, with a + if the work tree differs from
    it; None outside a checkout."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
