"""Means over seeds, with what they leave open."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom; beyond, the normal distribution's.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


@dataclass(frozen=True)
class Summary:
    """`std` is the sample standard deviation, `low` to `high` the 95 % t-interval of the mean; None for n = 1."""

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None

    def text(self, digits: int) -> str:
        """`81.94 ± 0.35`, or `81.94` for one value."""
        spread = f" ± {self.std:.{digits}f}" if self.std is not None else ""
        return f"{round(self.mean, digits) + 0.0:.{digits}f}{spread}"  # + 0.0: no minus before a zero


def summarise(values: Sequence[float | None]) -> Summary | None:
    """Of the values that are there and finite; None if there is none."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Summary(1, mean, None, None, None)
    std = statistics.stdev(values)
    half = (T_95[len(values) - 2] if len(values) <= 31 else 1.96) * std / math.sqrt(len(values))
    return Summary(len(values), mean, std, mean - half, mean + half)
