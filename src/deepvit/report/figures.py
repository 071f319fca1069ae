"""The report's pictures of a grid, and the first of them: accuracy and similarity against depth."""

import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from deepvit.report.contrasts import plan_of
from deepvit.report.curves import blocks_picture, curves_picture
from deepvit.report.forest import forest_picture
from deepvit.report.grid import Cell, Grid
from deepvit.report.picture import Picture, legend, look, unit_range
from deepvit.report.published import Published, entries
from deepvit.report.tables import (
    interval,
    mean_similarity,
    of_result,
    over_seeds,
    published_for,
    similar_blocks,
    similarity,
)


def pictures(grid: Grid, threshold: float, prefix: str = "") -> list[Picture]:
    """What can be drawn of a grid; nothing of one without a finished or begun run."""
    drawn = [forest_picture(grid, prefix)] if plan_of(grid) else []
    if any(cell.finished for cell in grid.cells):
        drawn.append(depth_picture(grid, threshold, prefix))
    if any(run.lines for run in grid.runs):
        drawn.append(curves_picture(grid, prefix))
    if any(similarity(run, "final", "final") for run in grid.runs):
        drawn.append(blocks_picture(grid, prefix))
    return drawn


def depth_picture(grid: Grid, threshold: float, prefix: str) -> Picture:
    axis = _axis(grid)
    panels = [lambda axes: _accuracy(axes, grid, axis)]
    if grid.data != "imagenet" and axis == "depth":
        panels.append(_paper)
    elif any(similarity(run, "final", "final") for run in grid.runs):
        panels.append(lambda axes: _similar_blocks(axes, grid, axis, threshold))
    if any(similarity(run, "final", "final") for run in grid.runs):
        panels += [lambda axes: _similarity(axes, grid, axis, "final"),
                   lambda axes: _similarity(axes, grid, axis, "softmax")]
    return Picture(f"{prefix}depth", f"Accuracy and mean similarity M of adjacent blocks against {axis}. "
                   f"Filled: trained; hollow, dotted: untrained. Bars: 95 %.", panels)


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
        parts += cell.details(grid, but=axis)
        parts += [f"{cell.depth} blocks"] if axis != "depth" and len(grid.depths) > 1 else []
        lines.setdefault(", ".join(parts), []).append(cell)
    return lines


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
    words = [textwrap.fill(str(value), 16) for value in values]
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
                      label=label or None, linestyle="" if axis == "attention" else "-", **look(label, list(lines)))
    if axis == "depth":
        _paper_points(axes, {_place(entry): entry.top1 for entry in _leading(grid)})
    _label_axis(axes, grid, axis)
    axes.set_ylabel("top-1 (%)")
    axes.set_title(f"Accuracy on {grid.data}")
    legend(axes)


def _leading(grid: Grid) -> list[Published]:
    """The published cell, if there is one, of each of ours."""
    return [found[0] for cell in grid.cells if (found := published_for(cell, grid))]


def _place(entry: Published) -> tuple[str, int]:
    return entry.match["model.attention.name"], entry.match["model.depth"]


def _paper_points(axes: Axes, points: Mapping[tuple[str, int], float]) -> None:
    for attention in ("self", "reattention"):
        depths = sorted(depth for name, depth in points if name == attention)
        if depths:
            axes.plot(depths, [points[attention, depth] for depth in depths], linestyle="--", alpha=0.8,
                      label=f"{attention}, the paper", markerfacecolor="none", **look(attention, [attention]))


def _paper(axes: Axes) -> None:
    """The paper's own figure, where the runs are of other data."""
    _paper_points(axes, {_place(entry): entry.top1 for entry in entries() if entry.source == "figure"})
    axes.set_xticks([12, 16, 24, 32])
    axes.set_xlabel("depth (blocks)")
    axes.set_ylabel("top-1 on ImageNet (%)")
    axes.set_title("For comparison: the paper, on ImageNet")
    legend(axes)


def _similar_blocks(axes: Axes, grid: Grid, axis: str, threshold: float) -> None:
    lines = _series(grid, axis)
    for label, cells in lines.items():
        found = [(cell, over_seeds(cell, lambda run: similar_blocks(run, "final", "final", threshold)))
                 for cell in cells]
        found = [(cell, summary.mean) for cell, summary in found if summary]
        axes.plot(_positions([cell for cell, _ in found], grid, axis), [mean for _, mean in found],
                  linestyle="" if axis == "attention" else "-", label=label or None, **look(label, list(lines)))
    if axis == "depth":
        _paper_points(axes, {_place(entry): entry.similar_blocks for entry in _leading(grid)
                             if entry.similar_blocks is not None})
    _label_axis(axes, grid, axis)
    axes.set_ylabel("similar blocks, trained")
    axes.set_ylim(-0.3, max(axes.get_ylim()[1], 1.0))
    axes.set_title(f"Adjacent pairs with M above {threshold:g} (final)")
    legend(axes)


def _similarity(axes: Axes, grid: Grid, axis: str, kind: str) -> None:
    lines = _series(grid, axis)
    for label, cells in lines.items():
        shape = look(label, list(lines))
        for moment, style in (("initial", {"linestyle": ":", "markerfacecolor": "none", "alpha": 0.7}),
                              ("final", {"linestyle": "-", "label": label or None})):
            found = [(cell, over_seeds(cell, lambda run, m=moment: mean_similarity(run, m, kind))) for cell in cells]
            found = [(cell, summary) for cell, summary in found if summary]
            if found:
                style = {**style, "linestyle": ""} if axis == "attention" else style
                axes.plot(_positions([cell for cell, _ in found], grid, axis), [summary.mean for _, summary in found],
                          **shape, **style)
    _label_axis(axes, grid, axis)
    axes.set_ylabel("mean M of adjacent blocks")
    axes.set_title({"final": "Maps that multiply the values (final)",
                    "softmax": "Maps before mixing and norm (softmax)"}[kind])
    moments = [axes.plot([], [], color="grey", marker="o", linestyle=style, markerfacecolor=face, label=label)[0]
               for label, style, face in (("trained", "-", "grey"), ("untrained", ":", "none"))]
    axes.legend(handles=moments, frameon=False, fontsize="small", loc="center right")
    unit_range(axes)
