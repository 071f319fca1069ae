"""The report's charts of a grid: its contrasts, accuracy and similarity against depth (or what varies instead), and
what happened within runs."""

import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from deepvit.report.chart import COLOURS, Chart, legend, look, unit_range
from deepvit.report.contrasts import Finding, find, plan_of
from deepvit.report.grid import Cell, Grid
from deepvit.report.published import Published
from deepvit.report.runs import Run
from deepvit.report.tables import (KINDS, interval, mean_similarity, of_result, over_seeds, published_for,
                                   similar_blocks, similarity)

MIN_POINTS = 4  # that the axis of accuracies spans
MAX_TITLE = 52  # characters in a line
CURVES = {"top1": "top-1 (%)", "loss": "training loss"}


def charts(grid: Grid, threshold: float, prefix: str = "") -> list[Chart]:
    """What can be drawn of a grid; nothing of one without a finished or begun run."""
    plan = plan_of(grid)
    findings = [one for one in find(plan, grid) if one.points] if plan else []
    drawn = [_forest_chart(findings, plan.margin, prefix)] if findings else []
    drawn += [depth_chart(grid, threshold, prefix)] if len(grid.finished) > 1 else []
    curves = _facet_chart(grid, f"{prefix}curves", "Training, one line a run; further seeds of a cell are pale.",
                          _curves, CURVES, lambda run: run.lines)
    blocks = _facet_chart(grid, f"{prefix}blocks", "Similarity M of each block's maps to the next block's, mean over "
                          "images, heads, tokens and seeds. Solid: trained; dotted: untrained.", _blocks, KINDS,
                          lambda run: similarity(run, "final", "final"))
    return drawn + [chart for chart in (curves, blocks) if chart.panels]


def _forest_chart(findings: Sequence[Finding], margin: float, prefix: str) -> Chart:
    return Chart(f"{prefix}contrasts", f"Differences paired by seed: mean, 95 % interval from three seeds on, one "
                 f"hollow dot a seed. Shaded: the margin of {margin:g} points.",
                 [partial(_forest, findings=findings, what="points", label="difference in points of top-1",
                          margin=margin),
                  partial(_forest, findings=findings, what="losses", label="difference in test log-loss")])


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

    def _value(self, cell: Cell) -> Any:
        return {"depth": cell.depth, "attention": cell.attention, **dict(zip(self.grid.extras, cell.extras))}[self.axis]

    def _style(self, label: str, linestyle: str = "-") -> dict[str, str]:
        return {**look(label, list(self.lines)), "linestyle": "" if self.axis == "attention" else linestyle}

    def _draw_means(self, axes: Axes, measure: Callable[[Run], float | None], linestyle: str = "-", **style: Any
                    ) -> None:
        for label, cells in self.lines.items():
            found = [(self.ticks[self._value(cell)], summary.mean) for cell in cells
                     if (summary := over_seeds(cell, measure))]
            axes.plot([x for x, _ in found], [mean for _, mean in found],
                      **{"label": label, **self._style(label, linestyle), **style})

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
                          label=label, **self._style(label))
        self._draw_published(axes, lambda entry: entry.top1)
        low, high = axes.get_ylim()
        more = max(MIN_POINTS - (high - low), 0) / 2
        axes.set_ylim(low - more, high + more)
        self._label(axes, "top-1 (%)", f"Accuracy on {self.grid.data}")

    def similar_blocks(self, axes: Axes, threshold: float) -> None:
        self._draw_means(axes, lambda run: similar_blocks(run, "final", "final", threshold))
        self._draw_published(axes, lambda entry: entry.similar_blocks)
        axes.set_ylim(-0.3, max(axes.get_ylim()[1], 1.0))
        self._label(axes, "similar blocks, trained", f"Adjacent pairs with M above {threshold:g} (final)")

    def similarity(self, axes: Axes, kind: str) -> None:
        self._draw_means(axes, lambda run: mean_similarity(run, "initial", kind), ":", label=None,
                         markerfacecolor="none", alpha=0.7)
        self._draw_means(axes, lambda run: mean_similarity(run, "final", kind))
        self._label(axes, "mean M of adjacent blocks", {"final": "Maps that multiply the values (final)",
                                                        "softmax": "Maps before mixing and norm (softmax)"}[kind])
        moments = [axes.plot([], [], color="grey", marker="o", linestyle=style, markerfacecolor=face, label=label)[0]
                   for label, style, face in (("trained", "-", "grey"), ("untrained", ":", "none"))]
        axes.legend(handles=moments, frameon=False, fontsize="small", loc="center right")
        unit_range(axes)

    def _draw_published(self, axes: Axes, value: Callable[[Published], float | None]) -> None:
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


def _facet_chart(grid: Grid, name: str, caption: str, draw: Callable[..., None], rows: Collection[str],
                 wanted: Callable[[Run], Collection]) -> Chart:
    """A column for the cells of one depth and one value of every further setting; all `rows` of up to 4 columns, the
    first two of more."""
    facets: dict[str, list[Cell]] = {}
    for cell in grid.cells:
        if any(map(wanted, cell.runs)):
            facets.setdefault(", ".join([f"{cell.depth} blocks", *cell.details(grid)]), []).append(cell)
    panels = [partial(draw, cells=cells, place=place, name=row)
              for row in list(rows)[:4 if len(facets) <= 4 else 2] for place, cells in facets.items()]
    return Chart(name, caption, panels, columns=min(max(len(facets), 2), 4))


def draw_curve(axes: Axes, run: Run, name: str, **style: Any) -> None:
    """`top1` (evaluations) or `loss` (training) against epochs; a single value as a dot."""
    lines = [line for line in run.lines if line.get(name) is not None and (name == "top1" or "top1" not in line)]
    axes.plot([line.get("epoch", 0.0) for line in lines], [line[name] for line in lines], **style,
              marker="o" if len(lines) == 1 else None)


def _curves(axes: Axes, cells: Sequence[Cell], place: str, name: str) -> None:
    labels = [cell.attention for cell in cells]
    for cell in cells:
        for index, run in enumerate(run for run in cell.runs if run.lines):
            style = {"alpha": 0.5} if index else {"alpha": 1.0, "label": cell.attention}
            draw_curve(axes, run, name, color=look(cell.attention, labels)["color"], linewidth=1.3, **style)
    axes.set(xlabel="epoch", ylabel=CURVES[name], title=textwrap.fill(place, MAX_TITLE))
    legend(axes)


def _blocks(axes: Axes, cells: Sequence[Cell], place: str, name: str) -> None:
    labels = [cell.attention for cell in cells]
    for cell in cells:
        shape = look(cell.attention, labels)
        for moment, style in (("initial", {"linestyle": ":", "alpha": 0.7}),
                              ("final", {"marker": shape["marker"], "markersize": 3, "label": cell.attention})):
            if values := [pairs for run in cell.finished if (pairs := similarity(run, moment, name))]:
                mean = [*map(fmean, zip(*values))]
                axes.plot(range(1, len(mean) + 1), mean, color=shape["color"], **style)
    axes.set(xlabel="block", ylabel="M to the next block", title=textwrap.fill(f"{KINDS[name]}: {place}", MAX_TITLE))
    axes.xaxis.get_major_locator().set_params(integer=True)
    unit_range(axes)
    legend(axes)
