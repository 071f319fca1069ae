"""Two configs side by side: which settings differ, and which of them matter."""

from collections.abc import Iterator, Mapping, Sequence
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


def typed_names(origin: Mapping[str, Any] | None, unknown: Sequence[str] = ()) -> set[str]:
    """The settings that were given on the command line of `origin`; `unknown`: where that is not recorded."""
    return {word.lstrip("+~").partition("=")[0] for word in (origin or {}).get("overrides", unknown)}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that can change a result and differ: name -> (before, now). One unknown to a side is off there."""
    old, new = comparable(before), comparable(now)
    pairs = {name: (old.get(name), new.get(name)) for name in sorted({*old, *new})}
    return {name: pair for name, pair in pairs.items()
            if pair[0] != pair[1] and (name in old and name in new or any(pair))}


def labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What distinguishes flat configs, in three words at most: `self`, `reattention, seed 1`; empty where all agree."""
    names = [name for name in dict.fromkeys(name for config in configs for name in config) if not has_no_effect(name)
             and any(config.get(name) != configs[0].get(name) for config in configs)]
    if "model.attention.name" in names:
        names = [name for name in names if not name.startswith("model.attention.") or name.endswith(".name")]
    first, last = ("model.attention.name", "model.depth", "init", "optimizer.lr"), ("seed",)
    names.sort(key=lambda name: first.index(name) if name in first else len(first) + (name in last))
    return [", ".join(_in_words(name, config.get(name)) for name in names[:3]) for config in configs]


def _in_words(name: str, value: Any) -> str:
    if name == "model.attention.name":
        return str(value)
    if name == "model.depth":
        return f"{value} blocks"
    short = name.rpartition(".")[2]
    text = f"{value:g}" if isinstance(value, float) else str(value).rpartition("/")[2]
    return f"no {short}" if value is None else f"{short} {text}"
