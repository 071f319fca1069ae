"""The report's charts of a grid, and one of them: accuracy and similarity against depth, or what varies instead."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from deepvit.report.contrasts import find, plan_of
from deepvit.report.curves import blocks_chart, curves_chart
from deepvit.report.forest import forest_chart
from deepvit.report.grid import Cell, Grid
from deepvit.report.chart import Chart, legend, look, unit_range
from deepvit.report.published import Published
from deepvit.report.runs import Run
from deepvit.report.tables import (interval, mean_similarity, of_result, over_seeds, published_for, similar_blocks,
                                   similarity)

LEAST_POINTS = 4  # that the axis of accuracies spans


def charts(grid: Grid, threshold: float, prefix: str = "") -> list[Chart]:
    """What can be drawn of a grid; nothing of one without a finished or begun run."""
    plan = plan_of(grid)
    drawn = [forest_chart(grid, prefix)] if plan and any(one.points for one in find(plan, grid)) else []
    if len(grid.finished) > 1:
        drawn.append(depth_chart(grid, threshold, prefix))
    if any(run.lines for run in grid.runs):
        drawn.append(curves_chart(grid, prefix))
    if any(similarity(run, "final", "final") for run in grid.runs):
        drawn.append(blocks_chart(grid, prefix))
    return drawn


def depth_chart(grid: Grid, threshold: float, prefix: str) -> Chart:
    plot = _Plot(grid)
    panels = [plot.accuracy]
    if any(similarity(run, "final", "final") for run in grid.runs):
        panels += [partial(plot.similar_blocks, threshold=threshold), partial(plot.similarity, kind="final"),
                   partial(plot.similarity, kind="softmax")]
    return Chart(f"{prefix}depth", f"Accuracy and mean similarity M of adjacent blocks against {plot.axis}. "
                   f"Filled: trained; hollow, dotted: untrained. Bars: 95 %.", panels)


@dataclass(frozen=True)
class _Plot:
    """A grid against one of its axes, a line for each value of the others."""

    grid: Grid

    @cached_property
    def axis(self) -> str:
        """Depth where it varies, else the first setting that does, else the attention."""
        return "depth" if len(self.grid.depths) > 1 else next(iter(self.grid.extras), "attention")

    @cached_property
    def lines(self) -> dict[str, list[Cell]]:
        """Cells by what tells their lines apart."""
        lines: dict[str, list[Cell]] = {}
        for cell in self.grid.cells:
            parts = [cell.attention, *cell.details(self.grid, but=self.axis)]
            parts += [f"{cell.depth} blocks"] * (self.axis != "depth" and len(self.grid.depths) > 1)
            lines.setdefault(", ".join(parts), []).append(cell)
        return lines

    @cached_property
    def ticks(self) -> dict[Any, float]:
        """Values of the axis and where they stand: numbers as they are, words at 0, 1, 2, ..."""
        values = list(dict.fromkeys(map(self._value, self.grid.cells)))
        are_numbers = all(isinstance(value, int | float) for value in values)
        return {value: value if are_numbers else place for place, value in enumerate(values)}

    @property
    def span(self) -> float:
        return max(self.ticks.values()) - min(self.ticks.values())

    @property
    def style(self) -> dict[str, str]:
        return {"linestyle": "" if self.axis == "attention" else "-"}

    def _value(self, cell: Cell) -> Any:
        values = {"depth": cell.depth, "attention": cell.attention, **dict(zip(self.grid.extras, cell.extras))}
        return values[self.axis]

    def draw(self, axes: Axes, measure: Callable[[Run], float | None], labelled: bool = True, **style: Any) -> None:
        """Means over seeds."""
        for label, cells in self.lines.items():
            found = [(self.ticks[self._value(cell)], summary.mean) for cell in cells
                     if (summary := over_seeds(cell, measure))]
            axes.plot([x for x, _ in found], [mean for _, mean in found], label=label if labelled else None,
                      **{**look(label, list(self.lines)), **self.style, **style})

    def accuracy(self, axes: Axes) -> None:
        for index, (label, cells) in enumerate(self.lines.items()):
            cells = [cell for cell in cells if cell.finished]
            if not cells:
                continue
            means = np.array([over_seeds(cell, of_result("top1")).mean for cell in cells])
            low, high = np.array([interval(cell) for cell in cells], float).T  # nan where there is none
            bars = np.nan_to_num(np.maximum([means - low, high - means], 0))
            shift = (index - (len(self.lines) - 1) / 2) * 0.012 * self.span  # so that bars do not hide each other
            axes.errorbar([self.ticks[self._value(cell)] + shift for cell in cells], means, yerr=bars, capsize=3,
                          label=label, **self.style, **look(label, list(self.lines)))
        self._paper(axes, lambda entry: entry.top1)
        low, high = axes.get_ylim()
        more = max(LEAST_POINTS - (high - low), 0) / 2
        axes.set_ylim(low - more, high + more)
        self._label(axes, "top-1 (%)", f"Accuracy on {self.grid.data}")

    def similar_blocks(self, axes: Axes, threshold: float) -> None:
        self.draw(axes, lambda run: similar_blocks(run, "final", "final", threshold))
        self._paper(axes, lambda entry: entry.similar_blocks)
        axes.set_ylim(-0.3, max(axes.get_ylim()[1], 1.0))
        self._label(axes, "similar blocks, trained", f"Adjacent pairs with M above {threshold:g} (final)")

    def similarity(self, axes: Axes, kind: str) -> None:
        dotted = {"linestyle": "" if self.axis == "attention" else ":", "markerfacecolor": "none", "alpha": 0.7}
        self.draw(axes, lambda run: mean_similarity(run, "initial", kind), labelled=False, **dotted)
        self.draw(axes, lambda run: mean_similarity(run, "final", kind))
        self._label(axes, "mean M of adjacent blocks", {"final": "Maps that multiply the values (final)",
                                                        "softmax": "Maps before mixing and norm (softmax)"}[kind])
        moments = [axes.plot([], [], color="grey", marker="o", linestyle=style, markerfacecolor=face, label=label)[0]
                   for label, style, face in (("trained", "-", "grey"), ("untrained", ":", "none"))]
        axes.legend(handles=moments, frameon=False, fontsize="small", loc="center right")
        unit_range(axes)

    def _paper(self, axes: Axes, value: Callable[[Published], float | None]) -> None:
        """The published numbers of the cells that have one, against depth."""
        entries = [found[0] for cell in self.grid.cells if (found := published_for(cell, self.grid))]
        for attention in ("self", "reattention") if self.axis == "depth" else ():
            told = {entry.match["model.depth"]: value(entry) for entry in entries
                    if entry.match["model.attention.name"] == attention}
            if found := sorted((depth, number) for depth, number in told.items() if number is not None):
                axes.plot(*zip(*found), linestyle="--", alpha=0.8, label=f"{attention}, the paper",
                          markerfacecolor="none", **look(attention, [attention]))

    def _label(self, axes: Axes, measure: str, title: str) -> None:
        axes.set(xlabel="depth (blocks)" if self.axis == "depth" else self.axis, ylabel=measure, title=title)
        margin = 0.06 * self.span or 0.5
        axes.set_xlim(min(self.ticks.values()) - margin, max(self.ticks.values()) + margin)  # unfinished cells' too
        words = [f"{one:g}" if isinstance(one, int | float) else textwrap.fill(str(one), 16) for one in self.ticks]
        slanted = max(map(len, words)) * len(words) > 40
        axes.set_xticks([*self.ticks.values()], words, rotation=20 if slanted else 0,
                        ha="right" if slanted else "center")
        legend(axes)
