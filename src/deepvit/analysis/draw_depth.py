"""Figures against depth: similarity, as a matrix and as curves, and the other measures. Studies in, figures out; a
probe as two images for those who watch a run."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from deepvit.analysis.draw_maps import SIGNED, caption, hide_axes, side_by_side
from deepvit.analysis.registry import MEASURES, Measure
from deepvit.analysis.study import Study

KINDS = {"final": "final maps", "softmax": "softmax maps", "final_centred": "final minus uniform",
         "softmax_centred": "softmax minus 1/N"}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]  # Okabe & Ito, distinct for every eye
MARKERS = ["o", "s", "^", "D"]
WIDTHS = {"final": 7, "softmax": 2.5, "final_centred": 4, "softmax_centred": 1.2}  # points: coinciding lines show


def similarity_matrices(studies: Sequence[Study]) -> Figure:
    """Mean M between all pairs of blocks, for the four kinds of maps, one row per model."""
    figure = Figure(figsize=(3.3 * len(KINDS) + 1.4, 3.5 * len(studies) + 0.7), layout="constrained", dpi=130)
    figure.suptitle("Similarity M of the attention maps of two blocks (mean over images, heads and tokens)",
                    fontsize=12)
    axes = figure.subplots(len(studies), len(KINDS), squeeze=False)
    for row, one in zip(axes, studies, strict=True):
        for ax, (kind, title) in zip(row, KINDS.items(), strict=True):
            found = one.facts["probe"]["similarity"].get(kind)
            if found is None:  # of recorded maps only the final ones are known
                ax.set_axis_off()
                continue
            share = f"{found['similar_blocks']} of {len(found['matrix']) - 1} adjacent pairs above 0.9"
            image = _draw_matrix(ax, found["matrix"], f"{title}\n{share}")
        row[0].set_ylabel(f"{textwrap.fill(caption(one), 34)}\n\nblock", fontsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("block", fontsize=8)
    figure.colorbar(image, ax=list(axes.ravel()), shrink=0.6, pad=0.01, label="M (cosine)")
    return figure


def _draw_matrix(ax: Axes, matrix: Sequence[Sequence[float]], title: str) -> AxesImage:
    """A similarity of all pairs of blocks, `[L, L]`."""
    L = len(matrix)
    image = ax.imshow(matrix, cmap=SIGNED, vmin=-1, vmax=1, extent=(0.5, L + 0.5, L + 0.5, 0.5))
    ax.set_title(title, fontsize=8)
    ax.tick_params(labelsize=7)
    _tick_whole_blocks(ax.xaxis, ax.yaxis)
    return image


def similarity_with_depth(studies: Sequence[Study]) -> Figure:
    """Adjacent M against depth for the four kinds of maps, trained and at initialisation."""
    figure, parts = side_by_side(studies, 6, 4.6, "Similarity M of each block and the next, against depth")
    for part, one in zip(parts, studies, strict=True):
        ax = part.subplots()
        trained = one.facts["probe"]["similarity"]
        initial = one.facts["initial"] and one.facts["initial"]["similarity"]
        for (kind, title), colour, marker in zip(KINDS.items(), COLOURS, MARKERS, strict=True):
            if kind not in trained:
                continue
            pairs = range(1, len(trained[kind]["adjacent"]) + 1)
            ax.plot(pairs, trained[kind]["adjacent"], color=colour, marker=marker, label=title, linewidth=WIDTHS[kind],
                    markersize=WIDTHS[kind] + 2.5, alpha=0.5 if kind == "final" else 1)
            if initial:
                ax.plot(pairs, initial[kind]["adjacent"], color=colour, linestyle=":", linewidth=1.2)
        ax.axhline(0.9, color="0.4", linewidth=0.8, linestyle="--")
        ax.text(0.99, 0.9, "0.9", transform=ax.get_yaxis_transform(), fontsize=7, color="0.4", va="bottom", ha="right")
        if initial:
            ax.plot([], [], color="0.3", linestyle=":", label="before training")
        ax.set(xlabel="between block b and b + 1", ylabel="M (cosine, mean over images, heads, tokens)",
               ylim=(min(-0.3, ax.get_ylim()[0]), 1.05))
        ax.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
        ax.grid(alpha=0.3)
        ax.set_xlim(left=0.5)
        _tick_whole_blocks(ax.xaxis)
    return figure


def measures_with_depth(studies: Sequence[Study]) -> Figure:
    """The other measures against depth, all models in one panel each, before training dotted."""
    shown = _drawn(*(one.facts["probe"] for one in studies))
    rows = -(-len(shown) // 2)
    figure = Figure(figsize=(10, 2.7 * rows + 1.2), layout="constrained", dpi=130)
    figure.suptitle("What attention does, against depth (dotted: before training)", fontsize=12)
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    for ax, measure in zip(axes, shown, strict=False):
        for one, colour, marker, width in zip(studies, COLOURS, MARKERS, (4, 1.5), strict=False):
            _plot(ax, measure.found_in(one.facts["probe"]), color=colour, marker=marker, markersize=width + 2,
                  linewidth=width, alpha=0.5 if width > 2 and len(studies) > 1 else 1)
            _plot(ax, measure.found_in(one.facts["initial"] or {}), color=colour, linestyle=":")
        ax.set_title(measure.title, fontsize=9)
        ax.set_ylabel(measure.unit, fontsize=8)
        ax.grid(alpha=0.3)
        scale(ax, measure.unit, measure.span)
    names = [Line2D([], [], color=colour, marker=marker, label=caption(one))
             for one, colour, marker in zip(studies, COLOURS, MARKERS, strict=False)]
    figure.legend(handles=names, fontsize=8, ncols=len(names), loc="outside lower center", frameon=False)
    hide_axes(axes[len(shown):])
    return figure


def draw_probe(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """`analysis.probe(..., matrix=True)` as two small images, uint8 [h, w, 3], drawn in a third of a second: similarity
    between all pairs of blocks, and the other measures against depth."""
    return {"attention/similarity": _pixels(_similarity(values["similarity"])),
            "attention/by_block": _pixels(_by_block(values))}


def _similarity(found: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(3 * len(KINDS), 3.1), dpi=90)
    axes = figure.subplots(1, len(KINDS))
    figure.subplots_adjust(left=0.05, right=0.9, bottom=0.16, top=0.9, wspace=0.22)
    for ax, (kind, title) in zip(axes, KINDS.items(), strict=True):
        image = _draw_matrix(ax, found[kind]["matrix"], title)
        ax.set_xlabel("block", fontsize=8)
    axes[0].set_ylabel("block", fontsize=8)
    bar = figure.colorbar(image, cax=figure.add_axes((0.92, 0.16, 0.01, 0.74))).ax
    bar.set_ylabel("M (cosine)", fontsize=8)
    bar.tick_params(labelsize=7)
    return figure


def _by_block(values: Mapping[str, Any]) -> Figure:
    shown = _drawn(values)
    rows = -(-len(shown) // 4)
    figure = Figure(figsize=(13, 2.7 * rows), dpi=90)
    axes = figure.subplots(rows, 4, squeeze=False).ravel()
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.2 / rows, top=1 - 0.2 / rows, wspace=0.25, hspace=0.5)
    for ax, measure in zip(axes, shown, strict=False):
        _plot(ax, measure.found_in(values), marker=".")
        ax.set_title(f"{measure.title}\n({measure.unit})", fontsize=8)
        scale(ax, measure.unit, measure.span)
    return figure


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _drawn(*probes: Mapping[str, Any]) -> list[Measure]:
    """The measures with a panel of their own that any of the probes has."""
    return [one for one in MEASURES.values() if one.title and any(_has(one.found_in(probe)) for probe in probes)]


def _has(values: Sequence[float | None]) -> bool:
    return any(value is not None for value in values)


def _plot(ax: Axes, values: Sequence[float | None], **style: Any) -> None:
    """By block, with gaps; nothing where there is no value."""
    if _has(values):
        ax.plot(range(1, len(values) + 1), np.array(values, float), **style)


def scale(ax: Axes, unit: str, least: float) -> None:
    """Whole blocks against an axis of `least` span or more, or noise would look like a trend."""
    ax.set_xlabel("block", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.set_xlim(left=0.5)
    _tick_whole_blocks(ax.xaxis)
    ratio = unit == "ratio" and any(np.nanmax(line.get_ydata(), initial=0) > 0 for line in ax.lines)
    if ratio:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.ticklabel_format(axis="y", useOffset=False)
    low, high, least = np.log([*ax.get_ylim(), least]) if ratio else [*ax.get_ylim(), least]
    ends = (low + high) / 2 + np.array([-0.5, 0.5]) * max(high - low, least)
    ax.set_ylim(np.exp(ends) if ratio else ends)


def _tick_whole_blocks(*axes: Axis) -> None:
    for axis in axes:
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
