"""Which runs belong in one table, what its axes are, and which of its runs are missing."""

import re
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from deepvit.report.runs import Run, Sweep, without_paths

WIDEST = 3  # settings beside depth, attention and seed in which runs that were started alone may differ in one table
# Settings that change no result, or that another one repeats.
NOT_COMPARED = ("engine.", "probe.", "fresh", "dry", "logger", "seed", "data.root", "data.workers",
                "data.eval_batch_size", "data.in_memory_mb", "data.max_bad", "data.on_error", "data.decoder",
                "data.img_size", "data.on_device", "model.num_classes")
NAMED_GROUPS = ("augment", "precision")
ATTENTION_ORDER = ("self", "norm_only", "reattention_fc", "reattention", "reattention_identity", "reattention_ln")


@dataclass(frozen=True)
class Cell:
    """All seeds of one configuration. `extras`: the values of the table's further columns; `settings`: of all that
    differ in the table."""

    depth: int
    attention: str
    extras: tuple[Any, ...]
    runs: tuple[Run, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    @property
    def status(self) -> str:
        """What is not finished, in words; empty for a whole cell."""
        return "; ".join(f"seed {run.config.get('seed')}: {run.progress}" if len(self.runs) > 1 else run.progress
                         for run in self.runs if not run.finished)

    def details(self, grid: "Grid", but: str = "") -> list[str]:
        """Its further columns in words, without the one called `but`: `lr 0.001`."""
        return [f"{name.rpartition('.')[2]} {plain(value)}" for name, value in zip(grid.extras, self.extras)
                if name != but]


def plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Grid:
    """Runs of one experiment."""

    data: str
    recipe: str | None
    extras: tuple[str, ...]  # settings that differ beside depth, attention and seed
    followers: Mapping[str, Sequence[str]]  # of each of `extras`, what always changes together with it
    cells: list[Cell]
    shared: dict[str, Any] = field(repr=False)  # what all runs have in common, flat
    duplicates: list[str] = field(default_factory=list)  # a sentence for each run that is left out
    sweep: Sweep | None = None
    label: str = ""  # what tells the experiment from others of the same data and recipe

    @property
    def name(self) -> str:
        return f"{self.data}, recipe {self.recipe or 'not recorded'}{self.label and f', {self.label}'}"

    @cached_property
    def planned(self) -> list[Run]:
        """All, with those that a sweep was to run and did not."""
        return [run for cell in self.cells for run in cell.runs]

    @cached_property
    def runs(self) -> list[Run]:
        return [run for run in self.planned if not run.is_missing]

    @property
    def finished(self) -> list[Cell]:
        """The cells with a finished run."""
        return [cell for cell in self.cells if cell.finished]

    @property
    def depths(self) -> list[int]:
        return sorted({cell.depth for cell in self.cells})

    @property
    def seeds(self) -> list[int]:
        return sorted({run.config.get("seed", 0) for run in self.planned})


def grids(runs: Sequence[Run]) -> list[Grid]:
    """One grid for each experiment: a sweep file's runs, or runs of the same data and recipe started by hand (alone or
    as cells of a command) while they differ in few settings."""
    started: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        started[_where_from(run)].append(run)
    found: list[list[Run]] = []
    for (*of, name, _), group in sorted(started.items()):
        homes = (other for other in found if _where_from(other[0])[:3] == (*of, "") and not name and _fit(other, group))
        if home := next(homes, None):
            home += group
        else:
            found.append(group)
    return _labelled([*map(_grid, found)])


def _where_from(run: Run) -> tuple[str, str, str, str]:
    """Data, recipe, sweep file, and what was started."""
    data = run.config["data"]
    return (f"{data_name(data)} {data.get('root') if data['source'] in ('folder', 'timm') else ''}",
            run.origin.get("recipe") or "", run.sweep and run.sweep.name or "",
            run.sweep.key if run.sweep else run.place)


def _fit(first: Sequence[Run], second: Sequence[Run]) -> bool:
    """Whether two groups differ from each other in no more than is readable, or than either does alone."""
    return len(_differing([*first, *second])) <= max(WIDEST, len(_differing(first)), len(_differing(second)))


def data_name(data: Mapping[str, Any]) -> str:
    """Which images: the built-in sets by name, folders by theirs."""
    parts = [data["source"]]
    if data["source"] in ("folder", "timm"):
        parts += [str(data[key]).rstrip("/").rpartition("/")[2] for key in ("name", "root") if data.get(key)]
    if data.get("classes"):
        parts.append(data["classes"] if isinstance(data["classes"], str) else f"first {data['classes']} classes")
    return " ".join(parts)


def _labelled(made: Sequence[Grid]) -> list[Grid]:
    """Those of the same data and recipe by their sweep's file, or by what was typed for all of their runs."""
    same = Counter((grid.data, grid.recipe) for grid in made)
    labels = [f"sweep {grid.sweep.name}" if grid.sweep and grid.sweep.name else
              _typed(grid.planned) if same[grid.data, grid.recipe] > 1 else "" for grid in made]
    named = [replace(grid, label=label) for grid, label in zip(made, labels)]
    seen = Counter()
    for index, grid in enumerate(named):
        seen[grid.name] += 1
        if (count := seen[grid.name]) > 1:
            named[index] = replace(grid, label=f"{grid.label} ({count})".strip())
    return named


def _typed(runs: Sequence[Run]) -> str:
    """The settings given for all of `runs` on their command lines."""
    first, *others = [run.origin.get("overrides", ()) for run in runs]
    words = [word for word in first if all(word in other for other in others)
             and not re.match(r"(\+*)(recipe|data|seed|engine|probe|logger|fresh|hydra)\b", word)]
    return without_paths(" ".join(words))


def _typed_names(runs: Sequence[Run]) -> set[str]:
    return {word.lstrip("+").split("=")[0] for run in runs for word in run.origin.get("overrides", ())}


def _grid(runs: Sequence[Run]) -> Grid:
    compared = compared_settings(runs)
    different, varying, typed = differing(compared), _differing(runs), _typed_names(runs)
    columns = [sorted(column, key=lambda name: name not in typed) for column in merged(varying, compared)]
    found: dict[tuple, list[Run]] = defaultdict(list)
    settings_of, duplicates = {}, []
    for run, settings, attention in zip(runs, compared, _attention_labels(runs)):
        key = (run.config["model"]["depth"], attention, tuple(_value(settings.get(column[0])) for column in columns))
        twin = next((other for other in found[key] if other.config.get("seed") == run.config.get("seed")), None)
        settings_of[key] = {name: settings.get(name) for name in varying}
        if twin is None:
            found[key].append(run)
        elif not run.is_missing:
            duplicates.append(f"{run.place} repeats {twin.place} (same settings and seed); it is left out.")
    extras = tuple(column[0].removeprefix("model.") for column in columns)
    return Grid(data_name(runs[0].config["data"]), runs[0].origin.get("recipe"), extras,
                {extra: column[1:] for extra, column in zip(extras, columns)},
                [Cell(*key, runs=tuple(sorted(found[key], key=lambda run: run.config.get("seed", 0))),
                      settings=settings_of[key]) for key in sorted(found, key=_order)],
                {name: compared[0].get(name) for settings in compared for name in settings if name not in different},
                duplicates, runs[-1].sweep)


def _differing(runs: Sequence[Run]) -> list[str]:
    """Settings beside depth, attention and seed in which runs differ."""
    return [name for name in differing(compared_settings(runs))
            if not name.startswith(("model.depth", "model.attention."))]


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]


def compared_settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The settings that make a difference, of each run. A group of settings goes by its name where all tell theirs."""
    compared = [{name: value for name, value in run.settings.items() if not name.startswith(NOT_COMPARED)}
                for run in runs]
    typed = _typed_names(runs)
    for group in NAMED_GROUPS:
        names = [run.origin.get("choices", {}).get(group) for run in runs]
        if None not in names:
            compared = _by_name(group, names, compared, typed)
    return compared


def _by_name(group: str, names: Sequence[str], compared: Sequence[dict[str, Any]], typed: Container[str]
             ) -> list[dict[str, Any]]:
    """`group` as the chosen name, and beside it what was typed or differs between runs of one name."""
    keys = {key for settings in compared for key in settings if key.startswith(f"{group}.")} - {*typed}
    one_of = dict(zip(names, compared))
    told = {key for key in keys if all(settings.get(key) == one_of[name].get(key)
                                       for name, settings in zip(names, compared))}
    return [{**{key: value for key, value in settings.items() if key not in told}, group: name}
            for name, settings in zip(names, compared)]


def merged(names: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Settings that always change together share a column (such as embed_dim and num_heads)."""
    columns: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        values = [setting.get(name) for setting in settings]
        columns.setdefault(tuple(values.index(value) for value in values), []).append(name)
    return [*columns.values()]


def _value(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return "–" if value is None else without_paths(str(value))


def _attention_labels(runs: Sequence[Run]) -> list[str]:
    """The attention's name, with those of its settings that differ between runs of that name."""
    variants = [*map(_attention, runs)]
    labels = []
    for variant in variants:
        varying = differing([other for other in variants if other["name"] == variant["name"]])
        details = ", ".join(f"{key}={variant.get(key)}" for key in varying)
        labels.append(f"{variant['name']} ({details})" if details else variant["name"])
    return labels


def _attention(run: Run) -> dict[str, Any]:
    attention = run.config["model"]["attention"]
    if isinstance(attention, str):
        return {"name": attention}
    return {"name": attention.get("name") or attention.get("class", "unnamed"), **attention}


def _order(key: tuple[int, str, tuple]) -> tuple:
    depth, attention, extras = key
    name = attention.split(" ")[0]
    rank = ATTENTION_ORDER.index(name) if name in ATTENTION_ORDER else len(ATTENTION_ORDER)
    return depth, tuple((isinstance(value, str), value) for value in extras), rank, attention
