"""Means over seeds with their intervals, tests of paired differences, and the contrasts of a study, named in its sweep
file before it runs (keys: docs/tables.md), paired by seed."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from scipy.special import stdtr, stdtrit

from deepvit.config.signature import ABOVE_ZERO, check_arguments, check_ranges
from deepvit.errors import UserError
from deepvit.report.grid import Grid, compared_settings, differing
from deepvit.report.runs import Run

WHERE = "hydra.callbacks.sweep.statistics"
LEVEL = 0.05
MAX_PRIMARY = 3
MIN_SEEDS = 3  # for an interval that says something


@dataclass(frozen=True)
class Summary:
    """`std` is the sample standard deviation, `low` to `high` the 95 % t-interval of the mean; None for n = 1."""

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None

    @property
    def student(self) -> tuple[float, float, int]:
        """Mean, its standard error, and degrees of freedom."""
        return self.mean, self.std / math.sqrt(self.n), self.n - 1

    def text(self, digits: int) -> str:
        """`81.94 ± 0.35`, or `81.94` for one value."""
        spread = f" ± {self.std:.{digits}f}" if self.std else ""
        return f"{round(self.mean, digits) + 0.0:.{digits}f}{spread}"  # + 0.0: no minus before a zero


def summarise(values: Sequence[float | None]) -> Summary | None:
    """Of the values that exist and are finite; None if there are none."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    n = len(values)
    if n < 2:
        return Summary(1, float(values[0]), None, None, None) if values else None
    mean, std = statistics.fmean(values), statistics.stdev(values)
    half = float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n)
    return Summary(n, mean, std, mean - half, mean + half)


@dataclass(frozen=True)
class Equivalence:
    """`low` to `high`: the 90 % interval of a mean; `p`: the larger of the two one-sided tests'."""

    low: float
    high: float
    p: float


def equivalence(mean: float, error: float, freedom: float, margin: float) -> Equivalence:
    """Two one-sided t-tests that a mean, of standard error `error` with `freedom` degrees of freedom, lies within
    `margin` of 0 (D. J. Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987)."""
    if error == 0:
        return Equivalence(mean, mean, float(abs(mean) >= margin))
    half = float(stdtrit(freedom, 0.95)) * error
    return Equivalence(mean - half, mean + half, float(stdtr(freedom, (abs(mean) - margin) / error)))


def p_of_no_difference(mean: float, error: float, freedom: float) -> float:
    """Student's two-sided test that a mean is 0."""
    return float(2 * stdtr(freedom, -abs(mean) / error)) if error else float(mean == 0)


def holm(ps: Sequence[float]) -> list[float]:
    """Each p adjusted for the number of tests, step by step (S. Holm, Scand. J. Statist. 6, 1979)."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for done, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - done) * ps[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class Contrast:
    """`plus` minus `minus`, at the settings `at`; with `against` minus the same difference there."""

    name: str
    plus: Mapping[str, Any]
    minus: Mapping[str, Any]
    at: Mapping[str, Any] = field(default_factory=dict)
    against: Mapping[str, Any] = field(default_factory=dict)
    claim: Literal["different", "greater", "less", "equal"] = "different"
    primary: bool = False

    @property
    def arms(self) -> list[tuple[int, dict[str, Any]]]:
        """Sign and settings of each arm."""
        arms = [(1, {**self.at, **self.plus}), (-1, {**self.at, **self.minus})]
        return arms + [(-sign, {**arm, **self.against}) for sign, arm in arms if self.against]

    @property
    def meaning(self) -> str:
        plus, minus, at, against = map(_in_words, (self.plus, self.minus, self.at, self.against))
        return f"{plus} minus {minus}{at and f', at {at}'}{against and f', less the same at {against}'}"


@dataclass(frozen=True)
class Plan:
    """`contrasts`: as given under their names, then read, the primary ones first; `margin`: points of top-1;
    `preregistered`: the file that said all this before the runs."""

    contrasts: Mapping[str, Any] | Sequence[Contrast]
    outcome: Literal["top1", "uncalibrated_top1"] = "top1"
    margin: float = 0.5
    preregistered: str | None = None


@dataclass(frozen=True)
class Finding:
    """A contrast's result. `points`, `losses`: the difference of each seed; `left_out`: seeds with a run missing;
    `unmatched`: how many combinations of the other settings an arm has no run of; `adjusted`: Holm's p, of the primary
    ones; `problem`: why there are no pairs."""

    contrast: Contrast
    margin: float
    points: Mapping[int, float]
    losses: Mapping[int, float]
    left_out: Sequence[int]
    unmatched: int = 0
    adjusted: float | None = None
    problem: str = ""

    @property
    def is_enough(self) -> bool:
        return len(self.points) >= MIN_SEEDS

    @cached_property
    def difference(self) -> Summary | None:
        return summarise([*self.points.values()])

    @cached_property
    def loss(self) -> Summary | None:
        return summarise([*self.losses.values()])

    @cached_property
    def p_different(self) -> float:
        return p_of_no_difference(*self.difference.student)

    @cached_property
    def equivalence(self) -> Equivalence:
        return equivalence(*self.difference.student, self.margin)

    @property
    def p(self) -> float:
        """Of what the claim denies: no difference, or one of at least the margin."""
        return self.equivalence.p if self.contrast.claim == "equal" else self.p_different

    @property
    def verdict(self) -> str:
        if self.problem or not self.is_enough:
            return self.problem or f"n = {len(self.points)}: no interval worth reading"
        claim, mean = self.contrast.claim, self.difference.mean
        is_sure = (self.p if self.adjusted is None else self.adjusted) < LEVEL
        same = f"equal within {self.margin:g} points"
        if claim == "equal":
            against = "different, against the claim" if self.p_different < LEVEL else "undecided"
            return f"{same}, as claimed" if is_sure else against
        if not is_sure:
            return same if self.equivalence.p < LEVEL else "undecided"
        side = "greater" if mean > 0 else "less"
        return side + {"different": "", side: ", as claimed"}.get(claim, ", against the claim")


def read_plan(given: Mapping[str, Any]) -> Plan:
    """Raises UserError for an unknown key or word, or more than three primary contrasts."""
    check_arguments(Plan, given, WHERE)
    check_ranges(given, {"margin": (ABOVE_ZERO, math.inf)}, WHERE)
    contrasts = []
    for name, one in given["contrasts"].items():
        check_arguments(Contrast, one, f"{WHERE}.contrasts.{name}", ignore_missing=("name",))
        contrasts.append(Contrast(**{**one, "name": name}))
    if sum(one.primary for one in contrasts) > MAX_PRIMARY:
        raise UserError(f"{WHERE}.contrasts has more than {MAX_PRIMARY} with primary: true: choose those that carry "
                        f"the study.")
    return Plan(**{**given, "contrasts": sorted(contrasts, key=lambda one: not one.primary)})


def plan_of(grid: Grid) -> Plan | None:
    return read_plan(grid.sweep.statistics) if grid.sweep and grid.sweep.statistics else None


def find(plan: Plan, grid: Grid) -> list[Finding]:
    """A plan's contrasts in the runs of its sweep, with the loss of the same evaluation."""
    loss = plan.outcome.replace("top1", "loss")
    found = []
    for contrast in plan.contrasts:
        try:
            points, left_out, unmatched = _pair(contrast, grid.planned, plan.outcome)
            losses, *_ = _pair(contrast, grid.planned, loss)
            found.append(Finding(contrast, plan.margin, points, losses, left_out, unmatched))
        except LookupError as error:
            found.append(Finding(contrast, plan.margin, {}, {}, [], problem=error.args[0]))
    primary = [one for one in found if one.contrast.primary]
    adjusted = holm([one.p if one.is_enough else 1.0 for one in primary])
    return [replace(one, adjusted=p) for one, p in zip(primary, adjusted)] + found[len(primary):]


def _pair(contrast: Contrast, runs: Sequence[Run], outcome: str) -> tuple[dict[int, float], list[int], int]:
    """The difference of each seed, averaged over the settings that the contrast leaves open and all arms have; the
    seeds that lack a run; and how many combinations of the open settings an arm has no run of."""
    places, arms, seeds = _places(contrast, runs), [], set()
    signs, settings = zip(*contrast.arms)
    for arm in settings:
        values: dict[str, dict[int, float]] = defaultdict(dict)
        for run, place in zip(runs, places):
            if all(run.chosen(name) == value for name, value in arm.items()):
                if run.seed in values[place]:
                    raise LookupError(f"several runs of one seed are {_in_words(arm)}: name what tells them apart")
                plain = run.result.get(outcome.removeprefix("uncalibrated_"))
                value = run.result.get(outcome, plain)  # without batch statistics there is no other
                values[place][run.seed] = math.nan if value is None else value  # missing, or not finite in its file
                seeds.add(run.seed)
        arms.append(values)
    common = set.intersection(*map(set, arms))
    if not common:
        raise LookupError(f"no run is {' or '.join(map(_in_words, settings))}, all else alike")
    found = {seed: sum(sign * values[place].get(seed, math.nan) for place in common
                       for sign, values in zip(signs, arms)) / len(common) for seed in sorted(seeds)}
    points = {seed: value for seed, value in found.items() if math.isfinite(value)}
    return points, [seed for seed in found if seed not in points], len(set.union(*map(set, arms)) - common)


def _in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _places(contrast: Contrast, runs: Sequence[Run]) -> list[str]:
    """What tells runs apart beside the settings that the contrast names, and those that follow from them, such as a
    learning rate of each arm's own; but never a depth."""
    names = [name for _, arm in contrast.arms for name in arm]
    named = [str([run.chosen(name) for name in names]) for run in runs]
    compared, always = compared_settings(runs), {"model.depth"} - {*names}
    free = [name for name in differing(compared) if name in always
            or len({(arm, str(settings.get(name))) for arm, settings in zip(named, compared)}) > len({*named})]
    return [str([settings.get(name) for name in free]) for settings in compared]
