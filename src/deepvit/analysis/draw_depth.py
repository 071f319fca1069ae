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
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from deepvit.analysis.draw_maps import SIGNED, caption, hide_axes, side_by_side
from deepvit.analysis.registry import MEASURES
from deepvit.analysis.study import Study

KINDS = {"final": "final maps", "softmax": "softmax maps", "final_centred": "final minus uniform",
         "softmax_centred": "softmax minus 1/N"}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]  # Okabe & Ito, distinct for every eye
MARKERS = ["o", "s", "^", "D"]
WIDTHS = {"final": 7, "softmax": 2.5, "final_centred": 4, "softmax_centred": 1.2}  # points: coinciding lines show


def similarity_matrices(studies: Sequence[Study]) -> Figure:
    """Mean M between all pairs of blocks, for the four kinds of maps, one row per model."""
    figure = _figure(3.3 * len(KINDS) + 1.4, 3.4 * len(studies) + 1,
                     "Similarity M of the attention maps of two blocks (mean over images, heads and tokens)", right=1.2)
    axes = figure.subplots(len(studies), len(KINDS), squeeze=False)
    for row, one in zip(axes, studies, strict=True):
        for ax, (kind, title) in zip(row, KINDS.items(), strict=True):
            found = one.facts["probe"]["similarity"].get(kind)
            if found is None:  # of recorded maps only the final ones are known
                ax.set_axis_off()
                continue
            L = len(found["matrix"])
            image = ax.imshow(found["matrix"], cmap=SIGNED, vmin=-1, vmax=1, extent=(0.5, L + 0.5, L + 0.5, 0.5))
            ax.set_title(f"{title}\n{found['similar_blocks']} of {L - 1} adjacent pairs above 0.9", fontsize=8)
            ax.tick_params(labelsize=7)
            _tick_whole_blocks(ax.xaxis, ax.yaxis)
        row[0].set_ylabel(f"{textwrap.fill(caption(one), 34)}\n\nblock", fontsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("block", fontsize=8)
    figure.colorbar(image, cax=figure.add_axes((0.93, 0.25, 0.01, 0.5)), label="M (cosine)")
    return figure


def _figure(width: float, height: float, title: str, right: float = 0.3) -> Figure:
    """Inches. Fixed margins are drawn twice as fast as fitted ones, and a run is watched by these figures."""
    figure = Figure(figsize=(width, height), dpi=130)
    figure.suptitle(title, fontsize=12, y=1 - 0.15 / height, va="top")
    figure.subplots_adjust(left=1.2 / width, right=1 - right / width, bottom=1 / height, top=1 - 0.8 / height,
                           wspace=0.3, hspace=0.6)
    return figure


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
            ax.plot([], [], color="0.3", linestyle=":", label="untrained")
        ax.set(xlabel="between block b and b + 1", ylabel="M (cosine, mean over images, heads, tokens)",
               ylim=(min(-0.3, ax.get_ylim()[0]), 1.05))
        ax.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
        ax.grid(alpha=0.3)
        ax.set_xlim(left=0.5)
        _tick_whole_blocks(ax.xaxis)
    return figure


def measures_with_depth(studies: Sequence[Study]) -> Figure:
    """The other measures against depth, all models in one panel each, untrained dotted."""
    probes = [one.facts["probe"] for one in studies]
    shown = [one for one in MEASURES.values() if one.title
             and any(value is not None for probe in probes for value in one.found_in(probe))]
    rows = -(-len(shown) // 3)
    figure = _figure(14, 2.6 * rows + 1.6, "What attention does, against depth (dotted: untrained)")
    axes = figure.subplots(rows, 3, squeeze=False).ravel()
    for ax, measure in zip(axes, shown, strict=False):
        for one, colour, marker, width in zip(studies, COLOURS, MARKERS, (4, 1.5), strict=False):
            trained, initial = (np.array(measure.found_in(one.facts[moment] or {}), float)  # nan: a gap
                                for moment in ("probe", "initial"))
            ax.plot(np.arange(len(trained)) + 1, trained, color=colour, marker=marker, markersize=width + 2,
                    linewidth=width, alpha=0.5 if width > 2 and len(studies) > 1 else 1)
            ax.plot(np.arange(len(initial)) + 1, initial, color=colour, linestyle=":")
        ax.set_title(measure.title, fontsize=9)
        ax.set_ylabel(measure.unit, fontsize=8)
        ax.grid(alpha=0.3)
        scale(ax, measure.unit, measure.span)
    names = [Line2D([], [], color=colour, marker=marker, label=caption(one))
             for one, colour, marker in zip(studies, COLOURS, MARKERS, strict=False)]
    figure.legend(handles=names, fontsize=8, ncols=len(names), loc="lower center", frameon=False)
    hide_axes(axes[len(shown):])
    return figure


def draw_probe(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """`analysis.probe(..., matrix=True)` as two images, uint8 [h, w, 3]: similarity, and all else by block."""
    studies = [Study({}, {"name": "this step", "attention": "", "probe": values, "initial": None})]
    return {"attention/similarity": _pixels(similarity_matrices(studies)),
            "attention/by_block": _pixels(measures_with_depth(studies))}


def _pixels(figure: Figure) -> np.ndarray:
    figure.set_dpi(90)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


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
