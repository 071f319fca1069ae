"""Published numbers with their sources, to stand beside the same cells of ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

IMAGENET_VAL = 50_000  # images of the validation set that the numbers are of


@dataclass(frozen=True)
class Published:
    """A published result. `top1` in percent; `source` a key of `SOURCES`; `match`: settings of the runs that are its
    cell, None for a model that is not built here; `remark`: to know before comparing; `time` of training."""

    model: str
    source: str
    top1: float
    match: Mapping[str, Any] | None = None
    params: float | None = None
    gflops: float | None = None
    img_size: int | None = None
    similar_blocks: int | None = None
    time: str | None = None
    remark: str = ""


_CONTENT = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
SOURCES: dict[str, str] = _CONTENT["sources"]
ENTRIES, OTHERS = ([Published(**entry) for entry in _CONTENT[kind]] for kind in ("entries", "others"))


def published_of(settings: Mapping[str, Any]) -> list[Published]:
    """The published cells that a run of these settings (flat) is comparable to, the leading source first."""
    return [entry for entry in ENTRIES
            if all(_matches(settings.get(name), wanted) for name, wanted in entry.match.items())]


def _matches(value: Any, wanted: Any) -> bool:
    """`*` in a word stands for anything but null; `!` before it negates it."""
    if not isinstance(wanted, str) or "*" not in wanted:
        return value == wanted
    return value is not None and fnmatchcase(str(value), wanted.lstrip("!")) != wanted.startswith("!")
