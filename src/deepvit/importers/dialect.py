"""A dialect: one implementation's layout of weights, as a table of names and tensor rules; and a file read by it."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from deepvit.errors import UserError, some
from deepvit.importers.files import WeightsFile
from deepvit.importers.settings import Grid


class Rule(NamedTuple):
    """How tensors become ours, `ours(*foreign)`, and back in the dialects that are written, `foreign(tensor)`."""

    ours: Callable[..., Tensor]
    foreign: Callable[[Tensor], Tensor] | None = None


COPY = Rule(lambda tensor: tensor, lambda tensor: tensor)
TRANSPOSE = Rule(lambda tensor: tensor.t())  # flax's [in, out] -> [out, in]
FLATTEN = Rule(lambda tensor: tensor.reshape(-1))


class Row(NamedTuple):
    """One line of a table. `{l}`, `{b}`, `{u}` stand for numbers, the same on both sides, `{n}` for any name."""

    foreign: str | tuple[str, ...]
    ours: str | None  # None: dropped, and `why`
    rule: Rule = COPY
    why: str = ""

    names = property(lambda self: (self.foreign,) if isinstance(self.foreign, str) else self.foreign)
    first = property(lambda self: self.names[0])


def both(foreign: str, ours: str | None = None, rule: Rule = COPY) -> list[Row]:
    """Weight and bias of a PyTorch layer; `ours` defaults to the same name."""
    return [Row(f"{foreign}.{name}", f"{ours or foreign}.{name}", rule) for name in ("weight", "bias")]


def flax_dense(foreign: str, ours: str) -> list[Row]:
    return [Row(f"{foreign}/kernel", f"{ours}.weight", TRANSPOSE), Row(f"{foreign}/bias", f"{ours}.bias")]


def flax_norm(foreign: str, ours: str) -> list[Row]:
    """Scale and bias; old files store GroupNorm's as (1, 1, 1, C)."""
    return [Row(f"{foreign}/scale", f"{ours}.weight", FLATTEN), Row(f"{foreign}/bias", f"{ours}.bias", FLATTEN)]


class Step(NamedTuple):
    """How one of our parameters is made: from which names of the file, by which rule, and its shape then."""

    foreign: tuple[str, ...]
    rule: Rule
    shape: Size


def translate(rows: Sequence[Row], shapes: Mapping[str, Size], source: str) -> tuple[dict[str, Step], dict[str, str]]:
    """A table applied to a file's names and shapes: our names with the steps to them, and the dropped ones with the
    reason. UserError, with `source` in it: names left over, a missing part, two for one parameter, a wrong shape."""
    steps: dict[str, Step] = {}
    dropped: dict[str, str] = {}
    left = set(shapes)
    for name in shapes:
        row, numbers = _match(rows, name, attrgetter("first"))
        if row is None:
            continue
        names = tuple(part.format(**numbers) for part in row.names)
        if absent := [part for part in names if part not in shapes]:
            raise UserError(f"{source} lacks '{absent[0]}', which goes with '{name}'.")
        left.difference_update(names)
        if row.ours is None:
            dropped |= dict.fromkeys(names, row.why)
            continue
        ours = row.ours.format(**numbers)
        if ours in steps:
            raise UserError(f"{source} holds both '{steps[ours].foreign[0]}' and '{name}' for one parameter.")
        steps[ours] = Step(names, row.rule, _shape(names, row.rule, shapes, source))
    if left:
        names = some([f"'{name[:80]}'" for name in sorted(left)])
        raise UserError(f"{source} holds {names}, which have no place in our models: give another file or dialect.")
    return steps, dropped


def foreign_name(rows: Iterable[Row], ours: str) -> str:
    """The dialect's name for one of our parameters, or ours if it has none."""
    row, numbers = _match(rows, ours, attrgetter("ours"))
    return row.first.format(**numbers) if row else ours


def write(rows: Iterable[Row], state: Mapping[str, Tensor], dialect: str) -> dict[str, Tensor]:
    """Our state dict in a dialect's names. Raises UserError for a parameter that the dialect has no name for."""
    written: dict[str, Tensor] = {}
    for ours, tensor in state.items():
        row, numbers = _match(rows, ours, attrgetter("ours"))
        if row is None:
            raise UserError(f"The dialect '{dialect}' has no place for '{ours}': export to safetensors.")
        written[row.foreign.format(**numbers)] = row.rule.foreign(tensor).contiguous()
    return written


def _match(rows: Iterable[Row], name: str, side: Callable[[Row], str | None]) -> tuple[Row | None, dict[str, str]]:
    """The first row whose pattern on one side the name fits, and the numbers in the name."""
    for row in rows:
        if (pattern := side(row)) and (found := _regex(pattern).fullmatch(name)):
            return row, found.groupdict()
    return None, {}


@cache
def _regex(pattern: str) -> re.Pattern:
    number, parts = r"(?:0|[1-9]\d{0,5})", re.split(r"\{(\w)\}", pattern)  # text, placeholder, text, ...
    return re.compile("".join(f"(?P<{part}>{'.+' if part == 'n' else number})" if i % 2 else re.escape(part)
                              for i, part in enumerate(parts)))


def _shape(names: Sequence[str], rule: Rule, shapes: Mapping[str, Size], source: str) -> Size:
    try:
        return rule.ours(*(torch.empty(shapes[name], device="meta") for name in names)).shape
    except (RuntimeError, ValueError, TypeError, IndexError, OverflowError):
        found = ", ".join(f"'{name}' {tuple(shapes[name])}" for name in names)
        raise UserError(f"{source} holds {found}, a shape that does not fit its name.") from None


@dataclass
class Report:
    """What was done to load a file; `print(report)` shows it in sentences."""

    path: Path
    dialect: str
    weights: str = "raw"  # or "ema"
    tensors: int = 0  # loaded into the model
    resized: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)  # name in the file -> why
    fresh: list[str] = field(default_factory=list)  # parameters that did not come from the file
    notes: list[str] = field(default_factory=list)
    said: dict[str, Any] = field(default_factory=dict)  # the file's metadata: arch, classes, ...
    head: nn.Module | None = None  # the classifier that came from the file, whose classes `said` names

    def __str__(self) -> str:
        which = "averaged (EMA)" if self.weights == "ema" else "raw"
        lines = [f"{self.path}: {self.tensors} tensors, {which} weights, read as dialect '{self.dialect}'"]
        lines += [f"  resized: {text}" for text in self.resized]
        for why in dict.fromkeys(self.dropped.values()):
            lines.append(f"  dropped: {some([name for name in self.dropped if self.dropped[name] == why])} ({why})")
        lines += [f"  not from the file: {', '.join(self.fresh)}"] if self.fresh else []
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


class Dialect(NamedTuple):
    """An implementation's layout. Its functions are given the caller's keywords beside the file."""

    name: str
    matches: Callable[[WeightsFile], bool]  # by metadata or names
    rows: Callable[[WeightsFile, Mapping[str, Any]], Sequence[Row]]
    infer: Callable[["Source", Mapping[str, Any]], dict[str, Any]]  # the settings that shapes do not decide
    resize: Callable[[Tensor, Grid, Grid], Tensor]  # positions `[1, 1 + N, D]`, their grid, the model's grid
    square_only: bool = False


@dataclass
class Source:
    """A file read as a dialect."""

    file: WeightsFile
    dialect: Dialect
    rows: Sequence[Row]
    steps: dict[str, Step]
    settings: dict[str, Any]  # those that its tensors decide
    report: Report

    def __str__(self) -> str:
        return str(self.file.path)
