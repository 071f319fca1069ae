"""Which runs belong in one table, what its axes are, and which of its runs are missing."""

import json
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from deepvit.report.runs import Run

# Settings that change no result, or that another one repeats.
NOT_COMPARED = ("engine.", "probe.", "fresh", "dry", "logger", "seed", "data.root", "data.workers",
                "data.eval_batch_size", "data.in_memory_mb", "data.max_bad", "data.on_error", "data.decoder",
                "data.img_size", "data.on_device", "model.num_classes", "model.depth", "model.attention.")
NAMED_GROUPS = ("augment", "precision")
ATTENTION_ORDER = ("self", "norm_only", "reattention_fc", "reattention", "reattention_identity", "reattention_ln")


@dataclass(frozen=True)
class Cell:
    """All seeds of one configuration. `extras`: the values of the table's further columns."""

    depth: int
    attention: str
    extras: tuple[Any, ...]
    runs: tuple[Run, ...] = ()

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    @property
    def status(self) -> str:
        """What is not finished, in words; empty for a whole cell."""
        return "; ".join(f"seed {run.config.get('seed')}: {run.progress}" if len(self.runs) > 1 else run.progress
                         for run in self.runs if not run.finished)


@dataclass(frozen=True)
class Grid:
    """Runs of one data set and recipe.

    Args:
        extras: names of the settings that differ beside depth, attention and seed.
        shared: what all runs have in common, flat.
    """

    data: str
    recipe: str | None
    extras: tuple[str, ...]
    cells: list[Cell]
    shared: dict[str, Any] = field(repr=False)
    duplicates: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.data}, recipe {self.recipe or 'not recorded'}"

    @cached_property
    def runs(self) -> list[Run]:
        """All that were begun."""
        return [run for cell in self.cells for run in cell.runs if not run.is_missing]

    @property
    def depths(self) -> list[int]:
        return sorted({cell.depth for cell in self.cells})

    @property
    def seeds(self) -> list[int]:
        return sorted({run.config.get("seed", 0) for cell in self.cells for run in cell.runs})


def grids(runs: Sequence[Run]) -> list[Grid]:
    """One grid for each data set and recipe: results of different ones do not compare."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[data_name(run.config["data"]), run.origin.get("recipe") or ""].append(run)
    return [_grid(data, recipe or None, group) for (data, recipe), group in sorted(groups.items())]


def data_name(data: Mapping[str, Any]) -> str:
    """Which pictures: the built-in sets by name, folders by where they are."""
    parts = [data["source"]]
    if data["source"] in ("folder", "timm"):
        parts += [str(data[key]) for key in ("name", "root") if data.get(key)]
    if data.get("classes"):
        parts.append(data["classes"] if isinstance(data["classes"], str) else f"first {data['classes']} classes")
    return " ".join(parts)


def _grid(data: str, recipe: str | None, runs: Sequence[Run]) -> Grid:
    compared = _compared(runs)
    names = list(dict.fromkeys(name for settings in compared for name in settings))
    differing = [name for name in names if len({_text(settings.get(name)) for settings in compared}) > 1]
    shared = {name: compared[0].get(name) for name in names if name not in differing}
    columns = _merged(differing, compared)
    labels = _attention_labels(runs)
    found: dict[tuple, list[Run]] = defaultdict(list)
    duplicates = []
    for run, settings, attention in zip(runs, compared, labels):
        key = (run.config["model"]["depth"], attention, tuple(_value(column, settings) for column in columns))
        twin = next((other for other in found[key] if other.config.get("seed") == run.config.get("seed")), None)
        if twin is None:
            found[key].append(run)
        elif not run.is_missing:
            duplicates.append(f"{run.path} repeats {twin.path} (same settings and seed); it is left out.")
    extras = tuple(" / ".join(_short(name) for name in column) for column in columns)
    return Grid(data, recipe, extras, _cells(found), shared, duplicates)


def _compared(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The settings that make a difference, of each run. A group of settings goes by its name where all tell theirs."""
    compared = [{name: value for name, value in run.settings.items()
                 if not name.startswith(NOT_COMPARED) or name == "model.attention"} for run in runs]
    typed = {word.lstrip("+").split("=")[0] for run in runs for word in run.origin.get("overrides", ())}
    for group in NAMED_GROUPS:
        names = [run.origin.get("choices", {}).get(group) for run in runs]
        if None not in names:
            compared = _by_name(group, names, compared, typed)
    return compared


def _by_name(group: str, names: Sequence[str], compared: Sequence[dict[str, Any]], typed: Container[str]
             ) -> list[dict[str, Any]]:
    """`group` as the chosen name, and beside it what was typed or differs between runs of one name."""
    keys = {key for settings in compared for key in settings if key.startswith(f"{group}.")} - {*typed}
    told = {key for key in keys if len({(name, _text(settings.get(key)))
                                        for name, settings in zip(names, compared)}) == len({*names})}
    return [{**{key: value for key, value in settings.items() if key not in told}, group: name}
            for name, settings in zip(names, compared)]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _merged(names: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Settings that always change together share a column (such as embed_dim / num_heads)."""
    columns: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        values = [_text(setting.get(name)) for setting in settings]
        columns.setdefault(tuple(values.index(value) for value in values), []).append(name)
    return [tuple(column) for column in columns.values()]


def _value(column: Sequence[str], settings: Mapping[str, Any]) -> Any:
    values = [settings.get(name) for name in column]
    if len(values) == 1 and isinstance(values[0], int | float) and not isinstance(values[0], bool):
        return values[0]
    return " / ".join("–" if value is None else str(value) for value in values)


def _short(name: str) -> str:
    """`model.embed_dim` -> `embed_dim`; other groups keep theirs."""
    return name.removeprefix("model.")


def _attention_labels(runs: Sequence[Run]) -> list[str]:
    """The attention's name, with those of its settings that differ between runs of that name."""
    variants = [_attention(run) for run in runs]
    labels = []
    for variant in variants:
        same = [other for other in variants if other["name"] == variant["name"]]
        differing = [key for key in variant if len({_text(other.get(key)) for other in same}) > 1]
        details = ", ".join(f"{key}={variant[key]}" for key in differing)
        labels.append(f"{variant['name']} ({details})" if details else variant["name"])
    return labels


def _attention(run: Run) -> dict[str, Any]:
    attention = run.config["model"]["attention"]
    if isinstance(attention, str):
        return {"name": attention}
    return {"name": attention.get("name") or attention.get("class", "unnamed"), **attention}


def _cells(found: Mapping[tuple, list[Run]]) -> list[Cell]:
    return [Cell(*key, runs=tuple(sorted(found[key], key=lambda run: run.config.get("seed", 0))))
            for key in sorted(found, key=_order)]


def _order(key: tuple[int, str, tuple]) -> tuple:
    depth, attention, extras = key
    name = attention.split(" ")[0]
    rank = ATTENTION_ORDER.index(name) if name in ATTENTION_ORDER else len(ATTENTION_ORDER)
    return depth, tuple((isinstance(value, str), value) for value in extras), rank, attention
