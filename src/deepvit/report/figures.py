"""The report's charts, drawn once and saved as PNG and SVG: of a grid its contrasts, accuracy and similarity against
depth, and what happened within its runs; of two runs their curves."""

import io
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import setp
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deepvit.report.grid import ATTENTION_ORDER, Cell, Grid
from deepvit.report.runs import Run
from deepvit.report.statistics import Finding, find, plan_of
from deepvit.report.tables import (KINDS, Measure, interval, mean_similarity, named_moments, of_result, over_seeds,
                                   published_for, similarity)

# Okabe and Ito's colours, told apart by colour-blind readers too; yellow is left out on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vP*X"
STYLE = {"font.size": 10, "axes.titlesize": 10, "legend.fontsize": 8, "axes.grid": True, "grid.alpha": 0.25,
         "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "deepvit", "svg.fonttype": "none",
         "legend.frameon": False, "text.parse_math": False}  # a $ in a name is a $
PANEL = (4.6, 3.4)  # inches
MAX_LINES = 8  # in a legend
MIN_POINTS = 4  # that the axis of accuracies spans
MAX_TITLE = 52  # characters in a line
CURVES = {"top1": "top-1 (%)", "loss": "training loss"}

Panel = Callable[[Axes], None]


@dataclass(frozen=True)
class Chart:
    """Panels that belong together, drawn: the same data give the same bytes. `narrow_svg` has one panel in a row."""

    name: str
    caption: str
    figure: Figure
    svg: bytes
    narrow_svg: bytes

    def save(self, folder: Path) -> Path:
        """Writes `<name>.png` and `<name>.svg`; returns the PNG's path."""
        self.figure.savefig(folder / f"{self.name}.png", dpi=130)
        (folder / f"{self.name}.svg").write_bytes(self.svg)
        return folder / f"{self.name}.png"


def _chart(name: str, caption: str, panels: Sequence[Panel], columns: int = 2) -> Chart:
    with matplotlib.rc_context(STYLE):
        figure = _arranged(panels, columns)
        svg = _svg(figure)
        return Chart(name, caption, figure, svg, _svg(_arranged(panels, 1)) if min(columns, len(panels)) > 1 else svg)


def _arranged(panels: Sequence[Panel], columns: int) -> Figure:
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip_longest(grid, panels, fillvalue=Axes.set_axis_off):
        panel(axes)
    _share_ranges(grid[:len(panels)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # long labels in small panels: not the reader's concern
        figure.draw_without_rendering()
    figure.set_layout_engine("none")  # arranged once, not again for each file
    return figure


def _svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _share_ranges(all_axes: Sequence[Axes]) -> None:
    """Panels with the same labels are read against each other."""
    for label in {axes.get_ylabel() for axes in all_axes}:
        group = [axes for axes in all_axes if axes.get_ylabel() == label]
        lows, highs = zip(*(axes.get_ylim() for axes in group))
        setp(group, ylim=(min(lows), max(highs)))


def look(label: str, labels: Sequence[str]) -> dict[str, str]:
    """A line's style. Well-known attentions keep theirs everywhere, and lend it, last, where absent: eight differ."""
    known = ATTENTION_ORDER[:4]
    places = [*range(len(COLOURS)), *(place for place, name in enumerate(known) if name not in labels)]
    index = places[[*dict.fromkeys([*known, *labels])].index(label) % len(places)]
    return {"color": COLOURS[index], "marker": MARKERS[index]}


def legend(axes: Axes) -> None:
    """Inside the axes if it is small, else below; none beyond `MAX_LINES`, where the tables tell lines apart."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles or len(labels) > MAX_LINES:
        return
    longest = max(map(len, labels))
    if len(labels) <= 4 and longest <= 24:
        axes.legend()
    else:
        labels = [label if len(label) <= 56 else f"{label[:53]}..." for label in labels]
        axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2 if longest <= 24 else 1)


def unit_range(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.05), max(high, 1.05))


def charts(grid: Grid, prefix: str = "") -> list[Chart]:
    """What can be drawn of a grid; nothing of one without a finished or begun run."""
    plan = plan_of(grid)
    findings = [one for one in find(plan, grid) if one.points] if plan else []
    drawn = [_forest_chart(findings, plan.margin, prefix)] if findings else []
    drawn += [depth_chart(grid, prefix)] if len({cell.depth for cell in grid.finished}) > 1 else []
    drawn += _facet_chart(grid, f"{prefix}curves", "Training, one line per run; further seeds of a cell are pale.",
                          _curves, CURVES, lambda run: run.lines)
    return drawn + _facet_chart(
        grid, f"{prefix}blocks", "Similarity M of each block's maps to the next block's, mean over images, heads, "
        f"tokens and seeds. Solid: trained; dotted: {named_moments(grid)['initial']}.", _blocks, KINDS,
        lambda run: similarity(run, "final", "final"))


def _forest_chart(findings: Sequence[Finding], margin: float, prefix: str) -> Chart:
    return _chart(f"{prefix}contrasts", f"Differences paired by seed: mean, 95 % interval from three seeds on, one "
                  f"hollow dot per seed. Shaded: the margin of {margin:g} points.",
                  [partial(_forest, findings=findings, margin=margin), partial(_forest, findings=findings)])


def _forest(axes: Axes, findings: Sequence[Finding], margin: float | None = None) -> None:
    """Of points of top-1, within their margin, or without one of log-loss."""
    if margin:
        axes.axvspan(-margin, margin, color="0.92", zorder=0)
    axes.axvline(0, color="0.4", linewidth=0.8)
    for row, one in enumerate(findings):
        values, found = (one.points, one.difference) if margin else (one.losses, one.loss)
        colour = COLOURS[0] if one.contrast.primary else COLOURS[7]
        axes.plot(values.values(), [row] * len(values), "o", markersize=3, markerfacecolor="none", color=colour,
                  alpha=0.6)
        bounds = [[found.mean - found.low], [found.high - found.mean]] if found and one.is_enough else None
        if found:
            axes.errorbar(found.mean, row, xerr=bounds, fmt="D", capsize=4, markersize=6, color=colour)
        axes.annotate(one.contrast.name + " (primary)" * one.contrast.primary, (0, row - 0.3), fontsize=8, va="bottom",
                      xycoords=("axes fraction", "data"))
    axes.set(ylim=(len(findings) - 0.5, -0.8), yticks=[],
             xlabel=f"difference in {'points of top-1' if margin else 'test log-loss'}")


def depth_chart(grid: Grid, prefix: str) -> Chart:
    plot = _Plot(grid)
    panels = [plot.accuracy]
    if any(similarity(run, "final", "final") for run in grid.runs):
        panels += [partial(plot.similarity, kind=kind) for kind in ("final", "softmax")]
    return _chart(f"{prefix}depth", "Accuracy and mean similarity M of adjacent blocks against depth. "
                  f"Filled: trained; hollow, dotted: {named_moments(grid)['initial']}. Bars: 95 %.", panels, columns=3)


class _Plot:
    """A grid against depth, a line for each attention and value of the other axes."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self.depths = sorted({cell.depth for cell in grid.cells})
        self.span = self.depths[-1] - self.depths[0]
        self.lines: dict[str, list[Cell]] = defaultdict(list)
        for cell in grid.cells:
            self.lines[", ".join([cell.attention, *cell.details(grid)])].append(cell)

    def _draw_means(self, axes: Axes, measure: Measure, linestyle: str = "-", **style: Any) -> None:
        for label, cells in self.lines.items():
            found = [(cell.depth, summary.mean) for cell in cells if (summary := over_seeds(cell, measure))]
            axes.plot([x for x, _ in found], [mean for _, mean in found],
                      **{"label": label, "linestyle": linestyle, **look(label, [*self.lines]), **style})

    def accuracy(self, axes: Axes) -> None:
        for index, (label, cells) in enumerate(self.lines.items()):
            cells = [cell for cell in cells if cell.finished]
            if not cells:
                continue
            means = np.array([over_seeds(cell, of_result("top1")).mean for cell in cells])
            low, high = np.array([interval(cell) for cell in cells], float).T  # nan where there is none
            bars = np.nan_to_num(np.maximum([means - low, high - means], 0))
            shift = (index - (len(self.lines) - 1) / 2) * 0.012 * self.span  # so that bars do not hide each other
            axes.errorbar([cell.depth + shift for cell in cells], means, yerr=bars, capsize=3, label=label,
                          **look(label, [*self.lines]))
        self._draw_published(axes)
        low, high = axes.get_ylim()
        more = max(MIN_POINTS - (high - low), 0) / 2
        axes.set_ylim(low - more, high + more)
        self._label(axes, "top-1 (%)", f"Accuracy on {self.grid.data}")

    def similarity(self, axes: Axes, kind: str) -> None:
        self._draw_means(axes, lambda run: mean_similarity(run, "initial", kind), ":", label=None,
                         markerfacecolor="none", alpha=0.7)
        self._draw_means(axes, lambda run: mean_similarity(run, "final", kind))
        self._label(axes, "mean M of adjacent blocks", {"final": "Maps that multiply the values (final)",
                                                        "softmax": "Maps before mixing and norm (softmax)"}[kind])
        named = named_moments(self.grid)
        moments = [axes.plot([], [], color="grey", marker="o", linestyle=style, markerfacecolor=face,
                             label=named[one])[0]
                   for one, style, face in (("final", "-", "grey"), ("initial", ":", "none"))]
        axes.legend(handles=moments, fontsize="small", loc="center right")
        unit_range(axes)

    def _draw_published(self, axes: Axes) -> None:
        """The published top-1 of the cells that have one, against depth."""
        entries = [found[0] for cell in self.grid.cells if (found := published_for(cell, self.grid))]
        for attention in ("self", "reattention"):
            told = {entry.match["model.depth"]: entry.top1 for entry in entries
                    if entry.match["model.attention.name"] == attention}
            if told:
                axes.plot(*zip(*sorted(told.items())), linestyle="--", alpha=0.8, label=f"{attention}, the paper",
                          markerfacecolor="none", **look(attention, [attention]))

    def _label(self, axes: Axes, measure: str, title: str) -> None:
        margin = 0.06 * self.span or 0.5
        axes.set(xlabel="depth (blocks)", ylabel=measure, title=title, xticks=self.depths,
                 xlim=(self.depths[0] - margin, self.depths[-1] + margin))  # unfinished cells' too
        legend(axes)


def _facet_chart(grid: Grid, name: str, caption: str, draw: Callable[..., None], rows: Collection[str],
                 wanted: Callable[[Run], Collection]) -> list[Chart]:
    """A column for each depth and value of every further setting; beyond 4 columns the first two `rows` alone. None
    where no run has what is `wanted`."""
    facets: dict[str, list[Cell]] = defaultdict(list)
    for cell in grid.cells:
        if any(map(wanted, cell.runs)):
            facets[", ".join([f"{cell.depth} blocks", *cell.details(grid)])].append(cell)
    labels = [cell.attention for cell in grid.cells]  # of all panels, in which a line looks the same
    panels = [partial(draw, cells=cells, labels=labels, place=place, name=row)
              for row in list(rows)[:4 if len(facets) <= 4 else 2] for place, cells in facets.items()]
    return [_chart(name, caption, panels, columns=min(max(len(facets), 2), 4))] if panels else []


def draw_curve(axes: Axes, run: Run, name: str, **style: Any) -> None:
    """`top1` (evaluations) or `loss` (training) against epochs; a single value as a dot."""
    lines = [line for line in run.lines if line.get(name) is not None and (name == "top1" or "top1" not in line)]
    axes.plot([line.get("epoch", 0.0) for line in lines], [line[name] for line in lines], **style,
              marker="o" if len(lines) == 1 else None)


def _curves(axes: Axes, cells: Sequence[Cell], labels: Sequence[str], place: str, name: str) -> None:
    for cell in cells:
        for index, run in enumerate(run for run in cell.runs if run.lines):
            style = {"alpha": 0.5} if index else {"alpha": 1.0, "label": cell.attention}
            draw_curve(axes, run, name, color=look(cell.attention, labels)["color"], linewidth=1.3, **style)
    axes.set(xlabel="epoch", ylabel=CURVES[name], title=textwrap.fill(place, MAX_TITLE))
    legend(axes)


def _blocks(axes: Axes, cells: Sequence[Cell], labels: Sequence[str], place: str, name: str) -> None:
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


def comparison_chart(runs: Sequence[Run], labels: Sequence[str]) -> Chart:
    return _chart("compare", f"{labels[0]} (solid) and {labels[1]} (dashed).",
                  [partial(_compared_curves, runs=runs, labels=labels, name=name) for name in CURVES])


def _compared_curves(axes: Axes, runs: Sequence[Run], labels: Sequence[str], name: str) -> None:
    for label, run, colour, style in zip(labels, runs, COLOURS, ("-", "--")):
        draw_curve(axes, run, name, color=colour, linestyle=style, label=label)
    axes.set(xlabel="epoch", ylabel=CURVES[name])
    legend(axes)
