"""The parity harness's test of equivalence, against scipy's t-tests."""

import numpy as np
import pytest
from parity import difference, table
from scipy import stats

from deepvit.report.statistics import equivalence


@pytest.mark.parametrize("margin", [0.2, 1.0, 3.0])
def test_two_one_sided_tests_are_scipys(margin):
    draw = np.random.default_rng(0)
    a, b = draw.normal(36.4, 0.8, 5), draw.normal(36.0, 0.4, 4)
    mean, error, freedom = difference(a, b)
    found = equivalence(mean, error, freedom, margin)
    sides = [stats.ttest_ind(a + margin, b, equal_var=False, alternative="greater").pvalue,
             stats.ttest_ind(a - margin, b, equal_var=False, alternative="less").pvalue]
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
    assert found.p == pytest.approx(max(sides)) and mean == pytest.approx(a.mean() - b.mean())
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert (found.p < 0.05) == (-margin < found.low and found.high < margin)


@pytest.mark.parametrize(("gap", "verdict"), [(0.1, "lies within"), (5.0, "does not lie within")])
def test_the_tables_verdict_is_the_tests(gap, verdict):
    rows = [{"trainer": name, "seed": seed, "cpu_s": 1.0, "curve": [[2.0, 2.0, 50 + shift + 0.1 * seed]]}
            for name, shift in (("timm", 0.0), ("ours", gap)) for seed in range(4)]
    assert verdict in table(rows, 1.0) and table(rows, 1.0).count("\n| ") >= 10
