"""The report's pictures: accuracy and similarity against depth, training curves, similarity in every block."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deepvit.report.grid import ATTENTION_ORDER, Cell, Grid
from deepvit.report.published import Published, entries
from deepvit.report.runs import Run
from deepvit.report.tables import KINDS, interval, mean_similarity, of_result, over_seeds, published_for, similarity

# Okabe and Ito's colours, told apart by colour-blind readers too; yellow is left out on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vP*X"
STYLE = {"font.size": 10, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
         "svg.hashsalt": "deepvit", "svg.fonttype": "none", "legend.frameon": False}
PANEL = (4.6, 3.4)  # inches

Panel = Callable[[Axes], None]


@dataclass(frozen=True)
class Picture:
    """Panels that belong together; those of one y label share its range. `caption` is a sentence or two."""

    name: str
    caption: str
    panels: Sequence[Panel]
    columns: int = 2

    def draw(self, columns: int | None = None) -> Figure:
        columns = min(columns or self.columns, len(self.panels))
        rows = -(-len(self.panels) // columns)
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
            grid = figure.subplots(rows, columns, squeeze=False).ravel()
            for axes, panel in zip(grid, self.panels):
                panel(axes)
            for axes in grid[len(self.panels):]:
                axes.set_axis_off()
            _share_ranges(grid[:len(self.panels)])
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # arranged once, not again for each file
        return figure

    def save(self, folder: Path) -> Path:
        """Writes `<name>.png` and `<name>.svg`; returns the PNG's path."""
        with matplotlib.rc_context(STYLE):
            self._wide.savefig(folder / f"{self.name}.png", dpi=130)
        (folder / f"{self.name}.svg").write_bytes(self.svg)
        return folder / f"{self.name}.png"

    @cached_property
    def svg(self) -> bytes:
        """The same bytes for the same data."""
        return _svg(self._wide)

    @cached_property
    def narrow_svg(self) -> bytes:
        """One panel in a row."""
        return _svg(self.draw(columns=1)) if min(self.columns, len(self.panels)) > 1 else self.svg

    @cached_property
    def _wide(self) -> Figure:
        return self.draw()


def _svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _share_ranges(all_axes: Iterable[Axes]) -> None:
    """Panels with the same labels are read against each other."""
    groups: dict[str, list[Axes]] = {}
    for axes in all_axes:
        groups.setdefault(axes.get_ylabel(), []).append(axes)
    for group in groups.values():
        limits = [axes.get_ylim() for axes in group]
        for axes in group:
            axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def pictures(grid: Grid, prefix: str = "") -> list[Picture]:
    """What can be drawn of a grid; nothing of one without a finished or begun run."""
    drawn = []
    if any(cell.finished for cell in grid.cells):
        drawn.append(depth_picture(grid, prefix))
    if any(run.lines for run in grid.runs):
        drawn.append(curves_picture(grid, prefix))
    if any(similarity(run, "final", "final") for run in grid.runs):
        drawn.append(blocks_picture(grid, prefix))
    return drawn


# Accuracy and similarity against depth (or whatever the table varies)

def depth_picture(grid: Grid, prefix: str) -> Picture:
    axis = _axis(grid)
    panels = [lambda axes: _accuracy(axes, grid, axis)]
    if grid.data != "imagenet" and axis == "depth":
        panels.append(_paper)
    if any(similarity(run, "final", "final") for run in grid.runs):
        panels += [lambda axes: _similarity(axes, grid, axis, "final"),
                   lambda axes: _similarity(axes, grid, axis, "softmax")]
    return Picture(f"{prefix}depth", f"Accuracy and mean similarity M of adjacent blocks against {axis}. Filled: "
                   f"trained; hollow, dotted: at initialisation. Bars: 95 %.", panels)


def _axis(grid: Grid) -> str:
    """Depth where it varies, else the first setting that does, else the attention."""
    if len(grid.depths) > 1:
        return "depth"
    return grid.extras[0] if grid.extras else "attention"


def _position(cell: Cell, grid: Grid, axis: str):
    if axis == "depth":
        return cell.depth
    return cell.attention if axis == "attention" else cell.extras[grid.extras.index(axis)]


def _series(grid: Grid, axis: str) -> dict[str, list[Cell]]:
    """Cells by what tells their lines apart: attention and every further setting but the axis."""
    lines: dict[str, list[Cell]] = {}
    for cell in grid.cells:
        parts = [cell.attention] if axis != "attention" else []
        parts += [f"{name} {value}" for name, value in zip(grid.extras, cell.extras) if name != axis]
        parts += [f"{cell.depth} blocks"] if axis != "depth" and len(grid.depths) > 1 else []
        lines.setdefault(", ".join(parts), []).append(cell)
    return lines


def _look(label: str, labels: Sequence[str]) -> dict[str, str]:
    """The well-known attentions keep their colour from figure to figure."""
    known = [name for name in ATTENTION_ORDER[:4]]
    index = known.index(label) if label in known else len(known) + [x for x in labels if x not in known].index(label)
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _positions(cells: Sequence[Cell], grid: Grid, axis: str) -> list[float]:
    """Numbers as they are; words at 0, 1, 2, ..."""
    values = list(dict.fromkeys(_position(cell, grid, axis) for cell in grid.cells))
    if all(isinstance(value, int | float) for value in values):
        return [_position(cell, grid, axis) for cell in cells]
    return [values.index(_position(cell, grid, axis)) for cell in cells]


def _span(grid: Grid, axis: str) -> float:
    positions = _positions(grid.cells, grid, axis)
    return max(positions) - min(positions)


def _label_axis(axes: Axes, grid: Grid, axis: str) -> None:
    values = list(dict.fromkeys(_position(cell, grid, axis) for cell in grid.cells))
    axes.set_xlabel("depth (blocks)" if axis == "depth" else axis)
    positions, margin = _positions(grid.cells, grid, axis), 0.06 * _span(grid, axis) or 0.5
    axes.set_xlim(min(positions) - margin, max(positions) + margin)  # room for cells that are not finished too
    if all(isinstance(value, int | float) for value in values):
        axes.set_xticks(values, [f"{value:g}" for value in values])
        return
    words = [str(value) for value in values]
    slanted = max(map(len, words)) * len(words) > 40
    axes.set_xticks(range(len(words)), words, rotation=20 if slanted else 0, ha="right" if slanted else "center")


def _accuracy(axes: Axes, grid: Grid, axis: str) -> None:
    lines = _series(grid, axis)
    for index, (label, cells) in enumerate(lines.items()):
        cells = [cell for cell in cells if cell.finished]
        if not cells:
            continue
        means = [over_seeds(cell, of_result("top1")).mean for cell in cells]
        bounds = [interval(cell) for cell in cells]
        bars = [[0 if low is None else max(mean - low, 0) for mean, (low, _) in zip(means, bounds)],
                [0 if high is None else max(high - mean, 0) for mean, (_, high) in zip(means, bounds)]]
        shift = (index - (len(lines) - 1) / 2) * 0.012 * _span(grid, axis)  # so that bars do not hide each other
        axes.errorbar([x + shift for x in _positions(cells, grid, axis)], means, yerr=bars, capsize=3,
                      label=label or None, linestyle="" if axis == "attention" else "-", **_look(label, list(lines)))
    if axis == "depth":
        _paper_points(axes, {entry for cell in grid.cells for entry in map(_key, published_for(cell))})
    _label_axis(axes, grid, axis)
    axes.set_ylabel("top-1 (%)")
    axes.set_title(f"Accuracy on {grid.data}", fontsize=10)
    _legend(axes)


def _key(entry: Published) -> tuple[str, int, float]:
    return entry.match["model.attention.name"], entry.match["model.depth"], entry.top1


def _paper_points(axes: Axes, points: set[tuple[str, int, float]]) -> None:
    for attention in ("self", "reattention"):
        chosen = sorted((depth, top1) for name, depth, top1 in points if name == attention)
        if chosen:
            look = _look(attention, [attention])
            axes.plot(*zip(*chosen), linestyle="--", label=f"{attention}, the paper", markerfacecolor="none",
                      alpha=0.8, **look)


def _paper(axes: Axes) -> None:
    """The paper's own figure, where the runs are of other data."""
    _paper_points(axes, {_key(entry) for entry in entries() if entry.source == "figure"})
    axes.set_xticks([12, 16, 24, 32])
    axes.set_xlabel("depth (blocks)")
    axes.set_ylabel("top-1 on ImageNet (%)")
    axes.set_title("For comparison: the paper, on ImageNet", fontsize=10)
    _legend(axes)


def _similarity(axes: Axes, grid: Grid, axis: str, kind: str) -> None:
    lines = _series(grid, axis)
    for label, cells in lines.items():
        look = _look(label, list(lines))
        for moment, style in (("initial", {"linestyle": ":", "markerfacecolor": "none", "alpha": 0.7}),
                              ("final", {"linestyle": "-", "label": label or None})):
            found = [(cell, over_seeds(cell, lambda run, m=moment: mean_similarity(run, m, kind))) for cell in cells]
            found = [(cell, summary) for cell, summary in found if summary]
            if found:
                style = {**style, "linestyle": ""} if axis == "attention" else style
                axes.plot(_positions([cell for cell, _ in found], grid, axis), [summary.mean for _, summary in found],
                          **look, **style)
    _label_axis(axes, grid, axis)
    axes.set_ylabel("mean M of adjacent blocks")
    axes.set_title({"final": "Maps that multiply the values (final)",
                    "softmax": "Maps before mixing and norm (softmax)"}[kind], fontsize=10)
    _unit_range(axes)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _unit_range(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.05), max(high, 1.05))


# Curves

CURVES = {"top1": "top-1 (%)", "loss": "training loss"}


def curves_picture(grid: Grid, prefix: str) -> Picture:
    depths = sorted({cell.depth for cell in grid.cells if any(run.lines for run in cell.runs)})
    panels = [lambda axes, d=depth, n=name: _curves(axes, grid, d, n) for name in CURVES for depth in depths]
    return Picture(f"{prefix}curves", "Training, one line a run.", panels, columns=min(len(depths), 4))


def curve(run: Run, name: str) -> tuple[list[float], list[float]]:
    """Epochs and values of `top1` (evaluations) or `loss` (training)."""
    lines = [line for line in run.lines if line.get(name) is not None and (name == "top1" or "top1" not in line)]
    return [line.get("epoch", 0.0) for line in lines], [line[name] for line in lines]


def _curves(axes: Axes, grid: Grid, depth: int, name: str) -> None:
    lines = _series(grid, "depth")
    for series, cells in lines.items():
        look = {"color": _look(series, list(lines))["color"], "linewidth": 1.3}
        runs = [run for cell in cells if cell.depth == depth for run in cell.runs if run.lines]
        for index, run in enumerate(runs):
            axes.plot(*curve(run, name), label=series if index == 0 else None, alpha=1.0 if index == 0 else 0.5, **look)
    axes.set_xlabel("epoch")
    axes.set_ylabel(CURVES[name])
    axes.set_title(f"{depth} blocks", fontsize=10)
    _legend(axes)


# Similarity in every block

def blocks_picture(grid: Grid, prefix: str) -> Picture:
    depths = sorted({cell.depth for cell in grid.cells if any(similarity(run, "final", "final") for run in cell.runs)})
    panels = [lambda axes, d=depth, k=kind: _blocks(axes, grid, d, k) for kind in KINDS for depth in depths]
    return Picture(f"{prefix}blocks", "Similarity M of each block's maps to the next block's, mean over pictures, "
                   "heads, tokens and seeds. Solid: trained; dotted: at initialisation.", panels,
                   columns=min(len(depths), 4))


def _blocks(axes: Axes, grid: Grid, depth: int, kind: str) -> None:
    lines = _series(grid, "depth")
    for series, cells in lines.items():
        look = _look(series, list(lines))
        for cell in (cell for cell in cells if cell.depth == depth):
            for moment, style in (("initial", {"linestyle": ":", "alpha": 0.7}),
                                  ("final", {"linestyle": "-", "label": series})):
                values = [pairs for run in cell.finished if (pairs := similarity(run, moment, kind))]
                if values:
                    mean = [sum(column) / len(column) for column in zip(*values)]
                    axes.plot(range(1, len(mean) + 1), mean, color=look["color"],
                              marker=look["marker"] if moment == "final" else None, markersize=3, **style)
    axes.set_xlabel("block")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("M to the next block")
    axes.set_title(f"{KINDS[kind]}, {depth} blocks", fontsize=10)
    _unit_range(axes)
    _legend(axes)
