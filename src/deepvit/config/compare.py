"""Two configs side by side: which settings differ, and which of them matter."""

from collections.abc import Iterator, Mapping
from typing import Any

# Settings that change no result: in no run's name, and not compared when a run is continued.
WITHOUT_EFFECT = ("engine", "probe", "fresh", "dry", "logger", "origin", "data.root", "data.workers",
                  "data.eval_batch_size", "data.in_memory_mb")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"model": {"depth": 8}}` -> `("model.depth", 8)`; an empty group is a value."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), value


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite of `flat`."""
    config: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        group = config
        for one in groups:
            group = group.setdefault(one, {})
        group[last] = value
    return config


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flat settings that can change a result."""
    return {name: value for name, value in flat(config) if not has_no_effect(name)}


def has_no_effect(name: str) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in WITHOUT_EFFECT)


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that can change a result and differ: dotted name -> (before, now).

    A setting that one side does not know yet is off there: null, false or empty.
    """
    old, new = comparable(before), comparable(now)
    pairs = {name: (old.get(name), new.get(name)) for name in sorted({*old, *new})}
    return {name: pair for name, pair in pairs.items()
            if pair[0] != pair[1] and (name in old and name in new or any(pair))}
