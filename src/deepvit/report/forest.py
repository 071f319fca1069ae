"""The contrasts of a study as a forest plot."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from deepvit.report.contrasts import Finding, find, plan_of
from deepvit.report.grid import Grid
from deepvit.report.chart import COLOURS, Chart


def forest_chart(grid: Grid, prefix: str) -> Chart:
    """Of a grid whose sweep names contrasts."""
    plan = plan_of(grid)
    findings = [one for one in find(plan, grid) if one.points]
    return Chart(f"{prefix}contrasts", f"Differences paired by seed: mean, 95 % interval from three seeds on, one "
                   f"hollow dot a seed. Shaded: the margin of {plan.margin:g} points.",
                   [lambda axes: _forest(axes, findings, "points", "difference in points of top-1", plan.margin),
                    lambda axes: _forest(axes, findings, "losses", "difference in test log-loss")])


def _forest(axes: Axes, findings: Sequence[Finding], what: str, label: str, margin: float = 0.0) -> None:
    if margin:
        axes.axvspan(-margin, margin, color="0.92", zorder=0)
    axes.axvline(0, color="0.4", linewidth=0.8)
    for row, one in enumerate(findings):
        values = getattr(one, what).values()
        found = one.difference if what == "points" else one.loss
        colour = COLOURS[0] if one.contrast.primary else COLOURS[7]
        axes.plot(values, [row] * len(values), "o", markersize=3, markerfacecolor="none", color=colour, alpha=0.6)
        bounds = [[found.mean - found.low], [found.high - found.mean]] if found and one.is_enough else None
        if found:
            axes.errorbar(found.mean, row, xerr=bounds, fmt="D", capsize=4, markersize=6, color=colour)
        axes.annotate(one.contrast.name + " (primary)" * one.contrast.primary, (0, row - 0.3), fontsize=8, va="bottom",
                      xycoords=("axes fraction", "data"))
    axes.set(ylim=(len(findings) - 0.5, -0.8), yticks=[], xlabel=label)
