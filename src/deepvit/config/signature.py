"""Names and types of given values, checked against the signature that will receive them."""

import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from deepvit.errors import UserError, did_you_mean

ABOVE_ZERO, BELOW_ONE = math.ulp(0.0), math.nextafter(1.0, 0.0)  # the nearest numbers that are
MOST_INT, MOST_FLOAT = 2**31 - 1, 3.4e38  # what libraries count with, and what float32 holds
Ranges = Mapping[str, tuple[float, float]]  # name -> smallest, largest; of a list's members each


def check_arguments(function: Callable, given: Mapping[str, Any], where: str = "",
                    ignore_missing: Collection[str] = ()) -> None:
    """Refuses what `function(**given)`, a function or class with annotated parameters, would: unknown names (with a
    suggestion), missing ones but for `ignore_missing`, wrong types. `where`: the config path in the sentence."""
    if not isinstance(given, Mapping):
        raise UserError(f"{where} is {_shown(given)}, which is not a mapping of settings.")
    prefix = f"{where}." if where else ""
    parameters, hints = parameters_of(function)
    for name, value in given.items():
        if name not in parameters:
            raise UserError(f"{prefix}{name} is not a setting.{did_you_mean(name, parameters)} "
                            f"The settings are: {', '.join(sorted(parameters))}.")
        if name in hints and not fits(value, hints[name]):
            raise UserError(f"{prefix}{name} is {_shown(value)}, which is not {describe(hints[name])}.")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in given and name not in ignore_missing:
            raise UserError(f"{prefix}{name} is missing: give it {describe(hints.get(name, Any))}.")


def check_ranges(values: Mapping[str, Any], ranges: Ranges, where: str = "") -> None:
    """Refuses numbers outside their ranges, also in lists; every number must be finite."""
    for name, value in values.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float):
                check_range(f"{where}.{name}" if where else name, number, *ranges.get(name, (-math.inf, math.inf)))


def check_range(name: str, value: float, least: float, most: float) -> None:
    """Refuses a number outside [least, most], or one that is not finite."""
    held = MOST_INT if isinstance(value, int) else MOST_FLOAT
    if max(least, -held) <= value <= min(most, held):
        return
    words = [] if least == -math.inf else ["above 0" if 0 < least <= 1 else f"at least {least:g}"]
    words += [] if most == math.inf else ["below 1" if most == BELOW_ONE else f"at most {most:g}"]
    words += [] if -held <= value <= held else ["a finite number of at most 32 bits"]
    raise UserError(f"{name}={value} must be {' and '.join(words)}.")


def ranges_of(kind: type) -> Ranges:
    """Those in the annotations of a dataclass: `steps: Annotated[int, (1, 100)] | None`; of a list, its members'."""
    def annotated(hint: Any) -> Iterator[Any]:
        if typing.get_origin(hint) is typing.Annotated:
            yield hint
        for part in typing.get_args(hint):
            yield from annotated(part)

    hints = typing.get_type_hints(kind, include_extras=True)
    return {name: one.__metadata__[0] for name, hint in hints.items() for one in annotated(hint)}


def parameters_of(function: Callable) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Named parameters and their types; `**kwargs` of a constructor are its base class's parameters."""
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    for one in [vars(cls).get("__init__") for cls in function.__mro__] if inspect.isclass(function) else [function]:
        if one is None:
            continue
        own = inspect.signature(one).parameters.values()
        parameters |= {p.name: p for p in own if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
                       and p.name not in parameters and p.name != "self"}
        hints = typing.get_type_hints(one) | hints
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return parameters, hints


def fits(value: Any, hint: Any) -> bool:
    """Whether `value`, as YAML gives it, serves where `hint` is asked for (an int for a float, a list for a tuple)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint is None or hint is type(None):
        return value is None
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if origin is None:
        return isinstance(value, hint)
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    if origin is tuple and Ellipsis not in arguments:
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    return all(fits(item, arguments[0]) for item in value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}


def describe(hint: Any) -> str:
    """The type in a user's words: `int | None` -> "a whole number or null"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join("null" if option is None else str(option) for option in arguments)
    if origin and issubclass(origin, Mapping):
        return "a mapping"
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)}"
    if origin:
        return f"a list of {describe(arguments[0]).removeprefix('a ')}s"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))
