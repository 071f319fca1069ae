"""A dialect's table of names and tensor rules, and what it makes of a file."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepvit.errors import UserError

NUMBER, ANYTHING = r"(?:0|[1-9]\d{0,5})", ".+"


class Rule(NamedTuple):
    """How tensors turn into ours (`ours(*foreign)`), and back where the dialect can be written (`foreign(tensor)`)."""

    ours: Callable[..., Tensor]
    foreign: Callable[[Tensor], Tensor] | None = None


COPY = Rule(lambda tensor: tensor, lambda tensor: tensor)
TRANSPOSE = Rule(lambda tensor: tensor.t(), lambda tensor: tensor.t())  # flax's [in, out] <-> [out, in]
FLATTEN = Rule(lambda tensor: tensor.reshape(-1))
HWIO = Rule(lambda kernel: kernel.permute(3, 2, 0, 1))  # [rows, columns, in, out] -> [out, in, rows, columns]
STACK = Rule(lambda *parts: torch.cat(parts))  # q, k, v -> rows of qkv


class Row(NamedTuple):
    """One line of a table. `{l}`, `{b}`, `{u}` stand for numbers, the same on both sides, `{n}` for any name."""

    foreign: str | tuple[str, ...]
    ours: str | None  # None: dropped, and `why`
    rule: Rule = COPY
    why: str = ""


def both(foreign: str, ours: str, rule: Rule = COPY) -> list[Row]:
    """Rows of a layer of PyTorch's: weight and bias."""
    return [Row(f"{foreign}.{name}", f"{ours}.{name}", rule) for name in ("weight", "bias")]


def flax_dense(foreign: str, ours: str) -> list[Row]:
    return [Row(f"{foreign}/kernel", f"{ours}.weight", TRANSPOSE), Row(f"{foreign}/bias", f"{ours}.bias")]


def flax_norm(foreign: str, ours: str) -> list[Row]:
    """Scale and bias; old files store GroupNorm's as (1, 1, 1, C)."""
    return [Row(f"{foreign}/scale", f"{ours}.weight", FLATTEN), Row(f"{foreign}/bias", f"{ours}.bias", FLATTEN)]


class Step(NamedTuple):
    foreign: tuple[str, ...]
    rule: Rule


class Translation(NamedTuple):
    """What a table makes of a file: our names with the steps to them, their shapes, and what is dropped and why."""

    steps: dict[str, Step]
    shapes: dict[str, torch.Size]
    dropped: dict[str, str]
    rows: Sequence[Row]


def translate(rows: Sequence[Row], shapes: Mapping[str, torch.Size], source: str) -> Translation:
    """Applies a table to the names and shapes of a file (no tensor is read).

    Args:
        source: the file and dialect, for messages.
    Raises:
        UserError: names left over, a part missing, two names for one parameter, a shape no rule fits.
    """
    patterns = [(row, _regex(_names(row)[0])) for row in rows]
    steps: dict[str, Step] = {}
    dropped: dict[str, str] = {}
    left = set(shapes)
    for name in shapes:
        row, found = next(((row, m) for row, regex in patterns if (m := regex.fullmatch(name))), (None, None))
        if row is None:
            continue
        numbers = found.groupdict()
        names = tuple(part.format(**numbers) for part in _names(row))
        if absent := [part for part in names if part not in shapes]:
            raise UserError(f"{source} lacks '{absent[0]}', which goes with '{name}'.")
        left.difference_update(names)
        if row.ours is None:
            dropped |= dict.fromkeys(names, row.why)
            continue
        ours = row.ours.format(**numbers)
        if ours in steps:
            raise UserError(f"{source} holds both '{steps[ours].foreign[0]}' and '{name}' for one parameter.")
        steps[ours] = Step(names, row.rule)
    if left:
        raise UserError(f"{source} holds {_listed(left)} that have no place in a model here: "
                        f"it is of another kind of model, or of another dialect.")
    return Translation(steps, {ours: _shape(step, shapes, source) for ours, step in steps.items()}, dropped,
                       rows)


def foreign_name(rows: Sequence[Row], ours: str) -> str:
    """The name a dialect has for one of our parameters (ours, if it has none)."""
    for row in rows:
        if row.ours is not None and (found := _regex(row.ours).fullmatch(ours)):
            return _names(row)[0].format(**found.groupdict())
    return ours


def write(rows: Sequence[Row], state: Mapping[str, Tensor], dialect: str) -> dict[str, Tensor]:
    """Our state dict in a dialect's names: the table read backwards.

    Raises:
        UserError: a parameter that the dialect has no name for.
    """
    written: dict[str, Tensor] = {}
    for ours, tensor in state.items():
        row, found = next(((row, m) for row in rows if row.ours is not None and row.rule.foreign
                           and isinstance(row.foreign, str) and (m := _regex(row.ours).fullmatch(ours))), (None, None))
        if row is None:
            raise UserError(f"The dialect '{dialect}' has no place for '{ours}': export to another one, "
                            f"such as safetensors.")
        written[row.foreign.format(**found.groupdict())] = row.rule.foreign(tensor).contiguous()
    return written


def _names(row: Row) -> tuple[str, ...]:
    return (row.foreign,) if isinstance(row.foreign, str) else row.foreign


def _regex(pattern: str) -> re.Pattern:
    parts = re.split(r"\{(\w)\}", pattern)  # text, placeholder, text, ...
    return re.compile("".join(f"(?P<{part}>{ANYTHING if part == 'n' else NUMBER})" if i % 2 else re.escape(part)
                              for i, part in enumerate(parts)))


def _shape(step: Step, shapes: Mapping[str, torch.Size], source: str) -> torch.Size:
    try:
        return step.rule.ours(*(torch.empty(shapes[name], device="meta") for name in step.foreign)).shape
    except (RuntimeError, ValueError, TypeError, IndexError, OverflowError):
        told = ", ".join(f"'{name}' {tuple(shapes[name])}" for name in step.foreign)
        raise UserError(f"{source} holds {told}, a shape that does not fit its name.") from None


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name[:80]}'" for name in names[:most]) + more
