"""What happens within runs: training curves, similarity in every block."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes

from deepvit.report.grid import Cell, Grid
from deepvit.report.picture import Picture, legend, look, title, unit_range
from deepvit.report.runs import Run
from deepvit.report.tables import KINDS, similarity

CURVES = {"top1": "top-1 (%)", "loss": "training loss"}


def curves_picture(grid: Grid, prefix: str) -> Picture:
    facets = _facets(grid, lambda run: bool(run.lines))
    panels = [lambda axes, f=facet, n=name: _curves(axes, facets[f], f, n) for name in CURVES for facet in facets]
    return Picture(f"{prefix}curves", "Training, one line a run; further seeds of a cell are pale.", panels,
                   columns=min(max(len(facets), 2), 4))


def blocks_picture(grid: Grid, prefix: str) -> Picture:
    facets = _facets(grid, lambda run: bool(similarity(run, "final", "final")))
    kinds = list(KINDS) if len(facets) <= 4 else ["final", "softmax"]
    panels = [lambda axes, f=facet, k=kind: _blocks(axes, facets[f], f, k) for kind in kinds for facet in facets]
    return Picture(f"{prefix}blocks", "Similarity M of each block's maps to the next block's, mean over images, "
                   "heads, tokens and seeds. Solid: trained; dotted: untrained.", panels,
                   columns=min(max(len(facets), 2), 4))


def _facets(grid: Grid, wanted: Callable[[Run], bool]) -> dict[str, list[Cell]]:
    """Panels: the cells of one depth and one value of every further setting, by what to call them."""
    found: dict[str, list[Cell]] = {}
    for cell in grid.cells:
        if any(map(wanted, cell.runs)):
            place = ", ".join([f"{cell.depth} blocks", *cell.details(grid)])
            found.setdefault(place, []).append(cell)
    return found


def draw_curve(axes: Axes, run: Run, name: str, **style: Any) -> None:
    """`top1` (evaluations) or `loss` (training) against epochs; a single value as a dot."""
    lines = [line for line in run.lines if line.get(name) is not None and (name == "top1" or "top1" not in line)]
    axes.plot([line.get("epoch", 0.0) for line in lines], [line[name] for line in lines], **style,
              marker="o" if len(lines) == 1 else None)


def _curves(axes: Axes, cells: Sequence[Cell], place: str, name: str) -> None:
    labels = [cell.attention for cell in cells]
    for cell in cells:
        for index, run in enumerate(run for run in cell.runs if run.lines):
            draw_curve(axes, run, name, label=cell.attention if index == 0 else None,
                       alpha=1.0 if index == 0 else 0.5, color=look(cell.attention, labels)["color"], linewidth=1.3)
    axes.set_xlabel("epoch")
    axes.set_ylabel(CURVES[name])
    title(axes, place)
    legend(axes)


def _blocks(axes: Axes, cells: Sequence[Cell], place: str, kind: str) -> None:
    labels = [cell.attention for cell in cells]
    for cell in cells:
        shape = look(cell.attention, labels)
        for moment, style in (("initial", {"linestyle": ":", "alpha": 0.7}),
                              ("final", {"marker": shape["marker"], "markersize": 3, "label": cell.attention})):
            values = [pairs for run in cell.finished if (pairs := similarity(run, moment, kind))]
            if values:
                mean = [sum(column) / len(column) for column in zip(*values)]
                axes.plot(range(1, len(mean) + 1), mean, color=shape["color"], **style)
    axes.set_xlabel("block")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("M to the next block")
    title(axes, f"{KINDS[kind]}: {place}")
    unit_range(axes)
    legend(axes)
