"""Which runs belong in one table, what its axes are, and which of its runs are missing."""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

from deepvit.report.runs import CONF, Run, flat

# Settings that change no result, or that another one repeats.
NOT_COMPARED = ("engine.", "probe.", "fresh", "dry", "logger", "seed", "data.root", "data.workers",
                "data.eval_batch_size", "data.in_memory_mb", "data.max_bad", "data.on_error", "data.decoder", "data.img_size",
                "model.num_classes", "model.depth", "model.attention.")
ATTENTION_ORDER = ("self", "norm_only", "reattention_fc", "reattention", "reattention_identity", "reattention_ln")


@dataclass(frozen=True)
class Cell:
    """All seeds of one configuration. `extras`: the values of the table's further columns."""

    depth: int
    attention: str
    extras: tuple[Any, ...]
    runs: tuple[Run, ...] = ()
    missing_seeds: tuple[int, ...] = ()

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    @property
    def status(self) -> str:
        """What is not finished, in words; empty for a whole cell."""
        parts = [f"seed {run.config.get('seed')}: {run.progress}" if len(self.runs) > 1 else run.progress
                 for run in self.runs if not run.finished]
        if not self.runs:
            return "missing"
        if self.missing_seeds:
            parts.append(f"seed {', '.join(map(str, self.missing_seeds))} missing")
        return "; ".join(parts)


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
        return f"{self.data}, recipe {self.recipe}" if self.recipe else self.data

    @cached_property
    def runs(self) -> list[Run]:
        return [run for cell in self.cells for run in cell.runs]

    @property
    def depths(self) -> list[int]:
        return sorted({cell.depth for cell in self.cells})

    @property
    def seeds(self) -> list[int]:
        return sorted({run.config.get("seed", 0) for run in self.runs})


def grids(runs: Sequence[Run]) -> list[Grid]:
    """One grid for each data set and recipe: results of different ones do not compare."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[data_name(run.config["data"]), run.recipe or ""].append(run)
    return [_grid(data, recipe or None, group) for (data, recipe), group in sorted(groups.items())]


def data_name(data: Mapping[str, Any]) -> str:
    """Which pictures: the built-in sets by name, folders by where they are."""
    parts = [data["source"]]
    if data["source"] in ("folder", "timm"):
        parts += [str(data[key]) for key in ("name", "root") if data.get(key)]
    if data.get("classes"):
        parts.append(f"first {data['classes']} classes")
    return " ".join(parts)


def _grid(data: str, recipe: str | None, runs: Sequence[Run]) -> Grid:
    compared = [_compared(run) for run in runs]
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
        else:
            duplicates.append(f"{run.path} repeats {twin.path} (same settings and seed); it is left out.")
    extras = tuple(" / ".join(_short(name) for name in column) for column in columns)
    return Grid(data, recipe, extras, _cells(found), shared, duplicates)


def _compared(run: Run) -> dict[str, Any]:
    """The settings that make a difference; a group of settings known by a name in `conf/` is that name."""
    settings = {name: value for name, value in run.settings.items()
                if not name.startswith(NOT_COMPARED) or name == "model.attention"}
    for group in ("augment", "precision"):
        name = choice(group, run.config)
        if name is not None:
            settings = {key: value for key, value in settings.items() if not key.startswith(f"{group}.")}
            settings[group] = name
    return settings


def choice(group: str, config: Mapping[str, Any]) -> str | None:
    """The file of `conf/<group>/` whose values `config` has; None if it has been changed."""
    for path in sorted((CONF / group).glob("*.yaml")):
        if _resolved(_stored(group, path.stem), config) == config.get(group):
            return path.stem
    return None


def _stored(group: str, name: str) -> dict[str, Any]:
    values = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    bases = [base for base in values.pop("defaults", []) if base != "_self_"]
    return {**{key: value for base in bases for key, value in _stored(group, base).items()}, **values}


def _resolved(values: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """With `${data.hflip}` and its like looked up in `config`."""
    known = dict(flat(config))
    return {name: known.get(value[2:-1], value) if isinstance(value, str) and value.startswith("${") else value
            for name, value in values.items()}


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
    missing = _missing([(depth, attention, *extras, run.config.get("seed", 0))
                        for (depth, attention, extras), runs in found.items() for run in runs])
    seeds: dict[tuple, list[int]] = defaultdict(list)
    for depth, attention, *extras, seed in missing:
        seeds[depth, attention, tuple(extras)].append(seed)
    keys = sorted({*found, *seeds}, key=_order)
    return [Cell(*key, runs=tuple(sorted(found.get(key, ()), key=lambda run: run.config.get("seed", 0))),
                 missing_seeds=tuple(sorted(seeds.get(key, ())))) for key in keys]


def _missing(points: Iterable[tuple]) -> set[tuple]:
    """The holes of a sweep: in a plane of two axes, points that complete a rectangle and whose row and column are at
    least half there. So neither a list of unrelated models nor two sweeps that meet in one cell have any."""
    there = set(points)
    holes = set()
    for first, second in itertools.combinations(range(len(next(iter(there), ()))), 2):
        planes: dict[tuple, set[tuple]] = defaultdict(set)
        for point in there:
            planes[point[:first] + point[first + 1:second] + point[second + 1:]].add((point[first], point[second]))
        for rest, found in planes.items():
            for x, y in _holes(found):
                point = [*rest]
                point.insert(first, x)
                point.insert(second, y)
                holes.add(tuple(point))
    return holes


def _holes(found: set[tuple]) -> list[tuple]:
    columns, rows = defaultdict(set), defaultdict(set)
    for x, y in found:
        columns[x].add(y)
        rows[y].add(x)
    return [(x, y) for x in columns for y in rows
            if (x, y) not in found and 2 * len(columns[x]) >= len(rows) and 2 * len(rows[y]) >= len(columns)
            and any(columns[other] & columns[x] for other in rows[y])]


def _order(key: tuple[int, str, tuple]) -> tuple:
    depth, attention, extras = key
    name = attention.split(" ")[0]
    rank = ATTENTION_ORDER.index(name) if name in ATTENTION_ORDER else len(ATTENTION_ORDER)
    return depth, tuple((isinstance(value, str), value) for value in extras), rank, attention
