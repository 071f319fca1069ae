"""A probe as two images for those who watch a run: small, and drawn in a third of a second."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deepvit.analysis.draw_depth import DRAWN, KINDS, draw_matrix, scale


def without_matrices(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `analysis.probe(..., matrix=True)` gives, without its matrices."""
    return {**values, "similarity": {kind: {name: value for name, value in found.items() if name != "matrix"}
                                     for kind, found in values["similarity"].items()}}


def draw_probe(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """`similarity` between all pairs of blocks and `by_block`, the other measures against depth, as uint8 [h, w, 3].

    values: of `analysis.probe(..., matrix=True)`.
    """
    return {"attention/similarity": _pixels(_similarity(values["similarity"])),
            "attention/by_block": _pixels(_by_block(values))}


def _similarity(found: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(3 * len(KINDS), 3.1), dpi=90)
    axes = figure.subplots(1, len(KINDS))
    figure.subplots_adjust(left=0.05, right=0.9, bottom=0.16, top=0.9, wspace=0.22)
    for ax, (kind, title) in zip(axes, KINDS.items(), strict=True):
        image = draw_matrix(ax, found[kind]["matrix"], title)
        ax.set_xlabel("block", fontsize=8)
    axes[0].set_ylabel("block", fontsize=8)
    bar = figure.colorbar(image, cax=figure.add_axes((0.92, 0.16, 0.01, 0.74))).ax
    bar.set_ylabel("M (cosine)", fontsize=8)
    bar.tick_params(labelsize=7)
    return figure


def _by_block(values: Mapping[str, Any]) -> Figure:
    shown = [(measure, found) for measure in DRAWN if {*(found := measure.found_in(values))} - {None}]
    rows = -(-len(shown) // 4)
    figure = Figure(figsize=(13, 2.7 * rows), dpi=90)
    axes = figure.subplots(rows, 4, squeeze=False).ravel()
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.2 / rows, top=1 - 0.2 / rows, wspace=0.25, hspace=0.5)
    for ax, (measure, found) in zip(axes, shown, strict=False):
        ax.plot(range(1, len(found) + 1), [np.nan if value is None else value for value in found], marker=".")
        scale(ax, measure.unit, measure.span)
        ax.set_title(f"{measure.title}\n({measure.unit})", fontsize=8)
        ax.set_xlabel("block", fontsize=8)
        ax.tick_params(labelsize=7)
    return figure


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
