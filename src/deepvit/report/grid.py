"""Which runs belong in one table, what its axes are, and what each of its cells holds."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from deepvit.config.compare import has_no_effect, typed_names
from deepvit.report.runs import Run, Sweep, without_paths

MAX_VARYING = 3  # settings beside depth, attention and seed in which runs started alone may differ in one table
# Beside those that change no result: settings of hardly any effect, or that another one repeats.
NOT_COMPARED = ("seed", "data.max_bad", "data.on_error", "data.decoder", "data.img_size", "data.on_device",
                "model.num_classes")
AXES = ("model.depth", "model.attention.")  # always columns
NAMED_GROUPS = ("augment", "precision")
ATTENTION_ORDER = ("self", "norm_only", "reattention_fc", "reattention", "reattention_identity", "reattention_ln")


@dataclass(frozen=True)
class Cell:
    """All seeds of one configuration, with its values of `Grid.extras` and of all settings that differ."""

    depth: int
    attention: str
    extras: tuple[Any, ...]
    runs: tuple[Run, ...]
    settings: Mapping[str, Any]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    @property
    def status(self) -> str:
        """What is not finished, in words; empty for a whole cell."""
        return "; ".join(f"seed {run.seed}: {run.progress}" if len(self.runs) > 1 else run.progress
                         for run in self.runs if not run.finished)

    def details(self, grid: "Grid") -> list[str]:
        """Its further columns in words: `lr 0.001`."""
        return [f"{name.rpartition('.')[2]} {plain(value)}" for name, value in zip(grid.extras, self.extras)]


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
    duplicates: list[str]  # a sentence for each run that is left out
    sweep: Sweep | None
    label: str = ""  # what tells the experiment from others of the same data and recipe

    @property
    def name(self) -> str:
        return f"{self.data}, recipe {self.recipe or 'not recorded'}{self.label and f', {self.label}'}"

    @cached_property
    def planned(self) -> list[Run]:
        """All runs, with those that a sweep was to run and did not."""
        return [run for cell in self.cells for run in cell.runs]

    @cached_property
    def runs(self) -> list[Run]:
        return [run for run in self.planned if not run.is_missing]

    @property
    def finished(self) -> list[Cell]:
        """The cells with a finished run."""
        return [cell for cell in self.cells if cell.finished]

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.planned})


def grids(runs: Sequence[Run]) -> list[Grid]:
    """One grid for each sweep file, and for runs started by hand of one data and recipe that differ in few settings."""
    started: dict[tuple[str, ...], list[Run]] = defaultdict(list)  # by data, recipe, sweep file, and what was started
    for run in runs:
        data, sweep = run.config["data"], run.sweep
        root = data.get("root") if data["source"] in ("folder", "timm") else ""
        started[f"{_data_name(data)} {root}", run.origin.get("recipe") or "", sweep and sweep.name or "",
                sweep.key if sweep else run.place].append(run)
    found: list[tuple[tuple[str, ...], list[Run]]] = []
    for (*key, _), group in sorted(started.items()):
        alike = (others for other, others in found if other == key and not key[2] and _fit(others, group))
        if home := next(alike, None):
            home += group
        else:
            found.append((key, group))
    return _label([_grid(group) for _, group in found])


def _fit(first: Sequence[Run], second: Sequence[Run]) -> bool:
    """Whether together they vary in no more settings than is readable, or than either does alone."""
    alone, other, together = (len(_varying(compared_settings(runs))) for runs in (first, second, [*first, *second]))
    return together <= max(MAX_VARYING, alone, other)


def _data_name(data: Mapping[str, Any]) -> str:
    """Which images: the built-in sets by name, folders by theirs."""
    parts = [data["source"]]
    if data["source"] in ("folder", "timm"):
        parts += [str(data[key]).rstrip("/").rpartition("/")[2] for key in ("name", "root") if data.get(key)]
    if data.get("classes"):
        parts.append(data["classes"] if isinstance(data["classes"], str) else f"first {data['classes']} classes")
    return " ".join(parts)


def _label(made: Sequence[Grid]) -> list[Grid]:
    """By their sweep's file, or where several are of the same data and recipe by what was typed for all runs."""
    same, seen, labelled = Counter((grid.data, grid.recipe) for grid in made), Counter(), []
    for grid in made:
        label = _typed(grid.planned) if same[grid.data, grid.recipe] > 1 else ""
        if grid.sweep and grid.sweep.name:
            label = f"sweep {grid.sweep.name}"
        key = (grid.data, grid.recipe, label)
        seen[key] += 1
        labelled.append(replace(grid, label=f"{label} ({seen[key]})".strip() if seen[key] > 1 else label))
    return labelled


def _typed(runs: Sequence[Run]) -> str:
    """The settings given for all of `runs` on their command lines."""
    first, *others = [run.origin.get("overrides", ()) for run in runs]
    words = [word for word in first if all(word in other for other in others)
             and not re.match(r"(\+*)(recipe|data|seed|engine|probe|logger|fresh|hydra)\b", word)]
    return without_paths(" ".join(words))


def _typed_names(runs: Sequence[Run]) -> set[str]:
    return set().union(*(typed_names(run.origin) for run in runs))


def _grid(runs: Sequence[Run]) -> Grid:
    runs = _decided(runs)
    compared = compared_settings(runs)
    varying, typed = _varying(compared), _typed_names(runs)
    columns = [sorted(column, key=lambda name: name not in typed) for column in merged(varying, compared)]
    extras = [_shown([settings.get(column[0]) for settings in compared]) for column in columns]
    found: dict[tuple, dict[int, Run]] = defaultdict(dict)  # by seed
    settings_of, duplicates = {}, []
    for run, settings, attention, *values in zip(runs, compared, _attention_labels(runs), *extras):
        key = (run.config["model"]["depth"], attention, tuple(values))
        settings_of[key] = {name: settings.get(name) for name in varying}
        first = found[key].setdefault(run.seed, run)
        if first is not run and not run.is_missing:
            duplicates.append(f"{run.place} repeats {first.place} (same settings and seed); it is left out.")
    cells = [Cell(*key, tuple(run for _, run in sorted(found[key].items())), settings_of[key])
             for key in sorted(found, key=_order)]
    different = differing(compared)
    shared = {name: compared[0].get(name) for settings in compared for name in settings if name not in different}
    followers = {column[0].removeprefix("model."): column[1:] for column in columns}
    return Grid(_data_name(runs[0].config["data"]), runs[0].origin.get("recipe"), tuple(followers), followers, cells,
                shared, duplicates, runs[-1].sweep)


def _decided(runs: Sequence[Run]) -> list[Run]:
    """Missing runs of `precision=auto`, which is decided as a run begins, with what all others have."""
    begun = [run for run in runs if not run.is_missing]
    if len({str(run.config.get("precision")) for run in begun}) != 1:
        return [*runs]
    precision, name = begun[0].config.get("precision"), begun[0].chosen("precision")

    def decided(run: Run) -> Run:
        origin = {**run.origin, "choices": {**run.origin["choices"], "precision": name}}
        return replace(run, config={**run.config, "precision": precision, "origin": origin})

    return [decided(run) if run.is_missing and run.chosen("precision") == "auto" else run for run in runs]


def _varying(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings beside depth, attention and seed in which runs differ."""
    return [name for name in differing(settings) if not name.startswith(AXES)]


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]


def compared_settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The settings that make a difference, of each run. A group of settings goes by its name where all runs have it."""
    compared = [{name: value for name, value in run.settings.items()
                 if not (has_no_effect(name) or name.startswith(NOT_COMPARED))} for run in runs]
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
    implied = {key for key in keys if all(settings.get(key) == one_of[name].get(key)
                                          for name, settings in zip(names, compared))}
    return [{**{key: value for key, value in settings.items() if key not in implied}, group: name}
            for name, settings in zip(names, compared)]


def merged(names: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Settings that always change together share a column (such as embed_dim and num_heads)."""
    columns: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        values = [setting.get(name) for setting in settings]
        columns.setdefault(tuple(values.index(value) for value in values), []).append(name)
    return [*columns.values()]


def _shown(values: Sequence[Any]) -> list[Any]:
    """A column's values without the folders above a path or, where two would then look alike, those above all paths."""
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in values]
    words = ["–" if value is None else str(value) for value in values]
    short = {word: without_paths(word) for word in words}
    if len({*short.values()}) < len(short):
        paths = [word for word in words if word.startswith("/")]
        top = os.path.commonpath(paths).rstrip("/") if paths else ""
        short = {word: f"...{word.removeprefix(top)}" if word in paths else word for word in words}
    return [value if is_number else short[word] for value, is_number, word in zip(values, numbers, words)]


def _attention_labels(runs: Sequence[Run]) -> list[str]:
    """The attention's name, with those of its settings that differ between runs of that name."""
    given = [run.config["model"]["attention"] for run in runs]
    attentions = [{"name": one} if isinstance(one, str) else one for one in given]
    variants = [{**one, "name": one.get("name") or one.get("class", "unnamed")} for one in attentions]
    labels = []
    for variant in variants:
        varying = differing([other for other in variants if other["name"] == variant["name"]])
        details = ", ".join(f"{key}={variant.get(key)}" for key in varying)
        labels.append(f"{variant['name']} ({details})" if details else variant["name"])
    return labels


def _order(key: tuple[int, str, tuple]) -> tuple:
    depth, attention, extras = key
    name = attention.split(" ")[0]
    rank = [*ATTENTION_ORDER, name].index(name)
    return depth, tuple((isinstance(value, str), value) for value in extras), rank, attention
