"""Means over seeds with their intervals, and tests of paired differences."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit


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
