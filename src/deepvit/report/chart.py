"""Charts of panels: drawn once, saved as PNG and SVG, side by side or in one column."""

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib
from matplotlib.artist import setp
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deepvit.report.grid import ATTENTION_ORDER

# Okabe and Ito's colours, told apart by colour-blind readers too; yellow is left out on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vP*X"
STYLE = {"font.size": 10, "axes.titlesize": 10, "legend.fontsize": 8, "axes.grid": True, "grid.alpha": 0.25,
         "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "deepvit", "svg.fonttype": "none",
         "legend.frameon": False, "text.parse_math": False}  # a $ in a name is a $
PANEL = (4.6, 3.4)  # inches
MAX_LINES = 8  # in a legend


@dataclass(frozen=True)
class Chart:
    """Panels that belong together; those with the same y label share its range. `caption` is a sentence or two."""

    name: str
    caption: str
    panels: Sequence[Callable[[Axes], None]]
    columns: int = 2

    def draw(self, columns: int) -> Figure:
        columns = min(columns, len(self.panels))
        rows = -(-len(self.panels) // columns)
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
            grid = figure.subplots(rows, columns, squeeze=False).ravel()
            for axes, panel in zip(grid, self.panels):
                panel(axes)
            for axes in grid[len(self.panels):]:
                axes.set_axis_off()
            _share_ranges(grid[:len(self.panels)])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # long labels in small panels: not the reader's concern
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
    def _wide(self) -> Figure:
        return self.draw(self.columns)

    @cached_property
    def svg(self) -> bytes:
        """The same bytes for the same data."""
        return _svg(self._wide)

    @cached_property
    def narrow_svg(self) -> bytes:
        """One panel in a row."""
        return _svg(self.draw(columns=1)) if min(self.columns, len(self.panels)) > 1 else self.svg


def _svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _share_ranges(all_axes: Sequence[Axes]) -> None:
    """Panels with the same labels are read against each other."""
    for label in {axes.get_ylabel() for axes in all_axes}:
        group = [axes for axes in all_axes if axes.get_ylabel() == label]
        lows, highs = zip(*(axes.get_ylim() for axes in group))
        setp(group, ylim=(min(lows), max(highs)))


def look(label: str, labels: Sequence[str]) -> dict[str, str]:
    """A line's style; the well-known attentions keep theirs from figure to figure."""
    index = [*dict.fromkeys([*ATTENTION_ORDER[:4], *labels])].index(label)
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


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
