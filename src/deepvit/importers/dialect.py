"""What a dialect is: how it is recognised, its table, what it computes that tensors do not tell, its resize rule."""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

from torch import Size

from deepvit.importers.files import WeightsFile
from deepvit.importers.positions import Resize
from deepvit.importers.table import Row


class Told(NamedTuple):
    """Settings that a dialect adds to what shapes decide, and remarks for the report."""

    settings: dict[str, Any]
    notes: list[str] = []


class Dialect(NamedTuple):
    """
    speaks: whether a set of names is this dialect's.
    rows: the table, given the file and the caller's keywords (some layouts need `in_chans`).
    tells: (file, settings decided by shapes, our shapes, caller's keywords) -> the rest of the settings; with
        `img_size` only where the file tells it.
    resize: the rule for position embeddings of another image size.
    square_only: its models know square images only.
    """

    name: str
    speaks: Callable[[Set[str]], bool]
    rows: Callable[[WeightsFile, Mapping[str, Any]], Sequence[Row]]
    tells: Callable[[WeightsFile, Mapping[str, Any], Mapping[str, Size], Mapping[str, Any]], Told]
    resize: Resize
    square_only: bool = False
