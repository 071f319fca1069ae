"""The figures of `deepvit figures`, studies in, figures out: maps by block and head, rollout over the images, the mix
of heads; similarity and the other measures against depth. And a probe as two images, for those who watch a run."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from deepvit.analysis.measures import MEASURES
from deepvit.analysis.study import Study

POSITIVE, SIGNED = "viridis", "RdBu_r"  # both readable without telling red from green
MIN_WIDTH = 7  # inches, for the title
FLAT = 2  # highest over lowest weight below which a map looks at nothing in particular
QUANTILE = 0.995  # of the absolute weights, where the colours end: a few large entries would leave the rest dark
SCALE = f"max: each panel's {QUANTILE:.1%} quantile; grey: flat (max/min below {FLAT:g}), drawn from min to max"
KINDS = {"final": "final maps", "softmax": "softmax maps", "final_centred": "final minus uniform",
         "softmax_centred": "softmax minus 1/N"}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]  # Okabe & Ito, distinct for every eye
MARKERS = ["o", "s", "^", "D"]
WIDTHS = {"final": 7, "softmax": 2.5, "final_centred": 4, "softmax_centred": 1.2}  # points: coinciding lines show


def side_by_side(studies: Sequence[Study], width: float, height: float, title: str) -> tuple[Figure, list[SubFigure]]:
    """A figure with a titled part for each study; inches for one part."""
    figure = Figure(figsize=(max(MIN_WIDTH, width * len(studies)), height), layout="constrained", dpi=130)
    figure.suptitle(title, fontsize=11)
    parts = figure.subfigures(1, len(studies), squeeze=False)[0]
    for part, one in zip(parts, studies, strict=True):
        part.suptitle(caption(one), fontsize=10)
    return figure, list(parts)


def caption(one: Study) -> str:
    name, attention, count = one.facts["name"], one.facts["attention"], one.facts["probe"]["images"]
    known = f"{one.facts['probe']['blocks']} blocks" + (f", {attention}" if attention not in name else "")
    return f"{name}: {known} ({count} image{'s' * (count > 1)})"


def mean_maps(studies: Sequence[Study]) -> Figure:
    """The final maps of every block, mean over images and heads, as the published figure."""
    deepest = max(len(one.tensors["mean_maps"]) for one in studies)
    columns = 4 if deepest <= 16 else 6
    rows = math.ceil(deepest / columns)
    figure, parts = side_by_side(studies, 1.7 * columns + 0.6, 1.85 * rows + 1,
                                 "Attention maps by block, mean over heads and images (rows: queries, columns: keys)\n"
                                 f"{SCALE}")
    for part, one in zip(parts, studies, strict=True):
        axes = part.subplots(rows, columns, squeeze=False).ravel()
        maps = one.tensors["mean_maps"]
        signed = bool((maps < 0).any())
        for i, (ax, block) in enumerate(zip(axes, maps, strict=False)):
            ax.imshow(coloured(block, signed), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"block {i + 1}\n{in_words(block)}", fontsize=7)
        hide_axes(axes[len(maps):])
        _relative_scale(part, list(axes), signed, shrink=0.5)
    return figure


def head_maps(one: Study) -> Figure:
    """The final maps of every block and head for the first image, as one sheet: blocks down, heads across."""
    maps = one.tensors["head_maps"].float()  # [L, H, N, N]
    L, H = maps.shape[:2]
    signed = bool((maps < 0).any())
    size = min(maps.shape[-1], 160)
    step = size + max(1, size // 12)  # with the gap
    sheet = np.ones((L * step, H * step, 4))
    for i in range(L):
        for h in range(H):
            sheet[i * step:i * step + size, h * step:h * step + size] = coloured(maps[i, h], signed, size)
    figure = Figure(figsize=(max(MIN_WIDTH, 0.85 * H + 1.6), 0.85 * L + 1.2), layout="constrained", dpi=150)
    figure.suptitle(f"Attention maps by block and head\n{caption(one)}\n"
                    f"first image: {_short(Path(one.facts['pictures'][0]).name, 40)}\n{SCALE}", fontsize=8)
    ax = figure.subplots()
    ax.imshow(sheet, interpolation="nearest")
    ax.set_yticks(np.arange(L) * step + size / 2, labels=[f"block {i + 1}" for i in range(L)], fontsize=7)
    ax.set_xticks(np.arange(H) * step + size / 2, labels=[f"head {h + 1}" for h in range(H)], fontsize=7)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    _relative_scale(figure, ax, signed, shrink=min(1, 4 / L))
    return figure


def rolled_out(studies: Sequence[Study]) -> Figure:
    """Attention rollout over each image with the most probable classes, one column per model."""
    pixels, names = studies[0].tensors["pixels"], studies[0].facts["pictures"]
    width = 1 + len(studies)  # of an image's group of panels
    groups = max(1, min(len(pixels), 6 // width))
    rows = math.ceil(len(pixels) / groups)
    figure = Figure(figsize=(max(MIN_WIDTH + 1, 2.3 * width * groups + 0.9), 3.0 * rows + 0.8), layout="constrained",
                    dpi=130)
    figure.suptitle("Attention rollout: what the class token holds of each patch (Abnar & Zuidema, 2020)", fontsize=11)
    panels = figure.subplots(rows, width * groups, squeeze=False).reshape(rows * groups, width)
    for i, (row, shown) in enumerate(zip(panels, pixels, strict=False)):
        row[0].imshow(shown.permute(1, 2, 0).numpy())
        row[0].set_title(_short(Path(names[i]).name, 26), fontsize=7)
        row[0].set_axis_off()
        for ax, one in zip(row[1:], studies, strict=True):
            image = _overlay(ax, one, i)
    hide_axes(panels[len(pixels):].ravel())
    figure.colorbar(image, ax=list(panels.ravel()), shrink=min(0.6, 2 / rows), pad=0.01,
                    ticks=[]).set_label("share of a patch, each panel's\nlowest to highest", fontsize=8)
    return figure


def theta(studies: Sequence[Study]) -> Figure | None:
    """Theta, the mix of heads, of every block that has one; None if no model has."""
    found = [(one, thetas) for one in studies
             if (thetas := {name: value for name, value in one.tensors.items() if name.startswith("theta/")})]
    if not found:
        return None
    columns = 4
    rows = math.ceil(max(len(thetas) for _, thetas in found) / columns)
    figure, parts = side_by_side([one for one, _ in found], 1.8 * columns + 0.6, 2.0 * rows + 1,
                                 "Theta, the mix of heads (rows: new head, columns: source head)")
    for part, (_, thetas) in zip(parts, found, strict=True):
        axes = part.subplots(rows, columns, squeeze=False).ravel()
        most = max(value.abs().max().item() for value in thetas.values())
        for ax, (name, value) in zip(axes, thetas.items(), strict=False):
            image = ax.imshow(value.numpy(), cmap=SIGNED, vmin=-most, vmax=most)
            heads = range(0, len(value), max(1, len(value) // 4))
            for set_ticks in (ax.set_xticks, ax.set_yticks):
                set_ticks(heads, labels=[str(h + 1) for h in heads], fontsize=6)
            ax.set_title(f"block {int(name.partition('/')[2]) + 1}", fontsize=8)
        hide_axes(axes[len(thetas):])
        part.colorbar(image, ax=list(axes), shrink=0.5, pad=0.02, label="weight of the source head")
    return figure


def _colour_limit(values: Tensor) -> float:
    """The absolute weight at which a panel's colours saturate."""
    return float(np.quantile(values.abs().numpy(), QUANTILE)) or 1.0


def coloured(values: Tensor, signed: bool, most: int = 300) -> np.ndarray:
    """A map `[N, N]` as RGBA of at most `most` pixels a side: in colour from 0 to `_colour_limit`, a flat one in grey
    from end to end; both ends of the whole map, as means of neighbours are flatter."""
    shown, limit = F.adaptive_avg_pool2d(values[None], min(most, len(values)))[0].numpy(), _colour_limit(values)
    if is_flat(values):
        return colormaps["gray"](Normalize(values.min().item(), values.max().item())(shown))
    return colormaps[SIGNED if signed else POSITIVE](Normalize(-limit if signed else 0, limit)(shown))


def _ratio(values: Tensor) -> float:
    """Highest over lowest weight."""
    low, high = values.min().item(), values.max().item()
    return high / low if low else np.inf


def is_flat(values: Tensor) -> bool:
    return 1 / FLAT < _ratio(values) < FLAT


def in_words(values: Tensor) -> str:
    ratio = _ratio(values)
    return f"flat, max/min = {max(ratio, 1 / ratio):.2f}" if is_flat(values) else f"max {_colour_limit(values):.2g}"


def _relative_scale(figure: Figure | SubFigure, axes: Axes | list[Axes], signed: bool, shrink: float) -> None:
    """One bar for panels with their own scales: its ends are each panel's."""
    shades = ScalarMappable(Normalize(-1 if signed else 0, 1), SIGNED if signed else POSITIVE)
    bar = figure.colorbar(shades, ax=axes, shrink=shrink, pad=0.02)
    bar.set_ticks([-1, 0, 1] if signed else [0, 1], labels=["-max", "0", "max"][-3 if signed else -2:])
    bar.set_label("weight", fontsize=8)


def hide_axes(axes: Sequence[Axes]) -> None:
    for ax in axes:
        ax.set_axis_off()


def _overlay(ax: Axes, one: Study, i: int) -> AxesImage:
    """The image in grey under the rollout, the class names below."""
    pixels, held = one.tensors["pixels"][i].float(), one.tensors["rollout"][i]
    mask = F.interpolate(held[None, None], size=pixels.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
    ax.imshow(pixels.mean(0).numpy(), cmap="gray", vmin=0, vmax=255)
    image = ax.imshow(mask.numpy(), cmap=POSITIVE, vmin=held.min().item(), vmax=held.max().item(),
                      alpha=0.25 if is_flat(held) else 0.6)
    ax.set(xticks=[], yticks=[])
    words = in_words(held) if is_flat(held) else f"max/min = {_ratio(held):.3g}"
    ax.set_title(f"{_short(one.facts['name'], 26)}\n{words}", fontsize=7)
    names = [f"{chance:6.1%} {_short(name, 24)}" for name, chance in one.facts["top"][i]] if one.facts["top"] else []
    ax.set_xlabel("\n".join(names), fontsize=6, family="monospace", loc="left")
    return image


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[:most // 2 - 1]}...{name[-(most // 2 - 2):]}"


# Against depth

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
        ax.set_xlim(0.5, max(2, one.facts["probe"]["blocks"]) - 0.5)
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
