"""Means over seeds, with what they leave open."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit


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
    half = float(stdtrit(len(values) - 1, 0.975)) * std / math.sqrt(len(values))
    return Summary(len(values), mean, std, mean - half, mean + half)
