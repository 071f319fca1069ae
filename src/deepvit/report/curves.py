"""What happens within runs: training curves, similarity in every block."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from statistics import fmean
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes

from deepvit.report.grid import Cell, Grid
from deepvit.report.chart import Chart, legend, look, unit_range
from deepvit.report.runs import Run
from deepvit.report.tables import KINDS, similarity

CURVES = {"top1": "top-1 (%)", "loss": "training loss"}
WIDTH = 52  # characters of a title


def curves_chart(grid: Grid, prefix: str) -> Chart:
    facets = _facets(grid, lambda run: run.lines)
    return _chart(f"{prefix}curves", "Training, one line a run; further seeds of a cell are pale.", _curves, CURVES,
                    facets)


def blocks_chart(grid: Grid, prefix: str) -> Chart:
    facets = _facets(grid, lambda run: similarity(run, "final", "final"))
    return _chart(f"{prefix}blocks", "Similarity M of each block's maps to the next block's, mean over images, "
                    "heads, tokens and seeds. Solid: trained; dotted: untrained.", _blocks,
                    KINDS if len(facets) <= 4 else ("final", "softmax"), facets)


def _facets(grid: Grid, wanted: Callable[[Run], Collection]) -> dict[str, list[Cell]]:
    """Panels: the cells of one depth and one value of every further setting, by what to call them."""
    found: dict[str, list[Cell]] = {}
    for cell in grid.cells:
        if any(map(wanted, cell.runs)):
            found.setdefault(", ".join([f"{cell.depth} blocks", *cell.details(grid)]), []).append(cell)
    return found


def _chart(name: str, caption: str, draw: Callable[..., None], rows: Collection[str], facets: dict[str, list[Cell]]
             ) -> Chart:
    panels = [partial(draw, cells=cells, place=place, name=row) for row in rows for place, cells in facets.items()]
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
    axes.set(xlabel="epoch", ylabel=CURVES[name], title=fill(place, WIDTH))
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
    axes.set(xlabel="block", ylabel="M to the next block", title=fill(f"{KINDS[name]}: {place}", WIDTH))
    axes.xaxis.get_major_locator().set_params(integer=True)
    unit_range(axes)
    legend(axes)
