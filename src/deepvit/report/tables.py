"""A grid as tables: what each column says, and the sentences below them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress
from typing import Any

from deepvit.report.grid import Cell, Grid, plain
from deepvit.report.published import IMAGENET_VAL, OTHERS, SOURCES, Published, published_of
from deepvit.report.runs import Run
from deepvit.report.statistics import Equivalence, Finding, Plan, Summary, find, plan_of, summarise

MOMENTS = ("initial", "final")  # before the first step, and after the last
KINDS = {"final": "final", "softmax": "softmax", "final_centred": "final-1/N", "softmax_centred": "softmax-1/N"}
NONE = "–"

Measure = Callable[[Run], float | None]


@dataclass(frozen=True)
class Table:
    """Rows of text under headers; `notes` are sentences below."""

    title: str
    headers: Sequence[str]
    rows: list[list[str]]
    notes: list[str]


def _table(title: str, columns: Mapping[str, Callable[[Any], str]], items: Iterable[Any], notes: list[str]) -> Table:
    """A row for each item, without the columns that say nothing. `columns`: header -> how it reads an item."""
    rows = [[read(item) for read in columns.values()] for item in items]
    kept = [not {*texts} <= {"", NONE} for texts in zip(*rows)]
    return Table(title, [*compress(columns, kept)], [[*compress(row, kept)] for row in rows], notes)


def named_moments(grid: Grid) -> dict[str, str]:
    """`MOMENTS` with the words of tables and captions: what is fine-tuned was never untrained."""
    began = {"of init" if run.settings.get("init") else "untrained" for run in grid.planned}
    return {"initial": " or ".join(sorted(began, reverse=True)), "final": "trained"}


def similarity(run: Run, moment: str, kind: str) -> list[float]:
    """M of each pair of adjacent blocks (mean over images, heads and tokens), empty if it was not measured. `moment`:
    one of `MOMENTS`; `kind`: of `KINDS`, `_centred` being maps minus 1/N."""
    found = (run.result.get(f"probe_{moment}") or {}).get("similarity", {}).get(kind) or {}
    return [value for value in found.get("adjacent", []) if value is not None]


def similar_blocks(run: Run, moment: str, kind: str, threshold: float) -> int | None:
    """Adjacent pairs whose M is above `threshold` (the paper leaves open how it counts)."""
    pairs = similarity(run, moment, kind)
    return sum(value > threshold for value in pairs) if pairs else None


def mean_similarity(run: Run, moment: str, kind: str) -> float | None:
    pairs = similarity(run, moment, kind)
    return sum(pairs) / len(pairs) if pairs else None


def over_seeds(cell: Cell, measure: Measure) -> Summary | None:
    return summarise([measure(run) for run in cell.finished])


def of_result(name: str) -> Measure:
    return lambda run: run.result.get(name)


def interval(cell: Cell) -> tuple[float | None, float | None]:
    """95 % interval of the top-1: of the mean over three seeds or more, or of a single run's share of images."""
    summary = over_seeds(cell, of_result("top1"))
    if summary is None or summary.n == 2:
        return None, None
    if summary.n > 2:
        return max(summary.low, 0.0), min(summary.high, 100.0)
    return tuple(map(cell.finished[0].result.get, ("top1_low", "top1_high")))


def published_for(cell: Cell, grid: Grid) -> list[Published]:
    """None where runs of its kind, of any depth, were evaluated on a part of ImageNet: any folder can be that."""
    same = [run for other in grid.cells if (other.attention, other.extras) == (cell.attention, cell.extras)
            for run in other.runs if run.settings.get("data.source") == "imagenet"]
    is_part = any(run.result.get("n", IMAGENET_VAL) != IMAGENET_VAL for run in same)
    return [] if is_part else published_of(cell.runs[0].settings)


def tables(grid: Grid, threshold: float) -> list[Table]:
    """The grid's results, the similarities behind them, and on ImageNet what others report."""
    plan = plan_of(grid)
    found = [_contrasts(plan, grid)] if plan else []
    found += [_results(grid, threshold), _similarities(grid)]
    found += [_table("Size and speed", {**_axes(grid), **COSTS}, grid.finished, [
        "GFLOP: forward, one image. images/s: training speed of these runs on their machines, not a benchmark."])]
    found += [_others()] if grid.data == "imagenet" else []
    return [table for table in found if table.rows]


def _contrasts(plan: Plan, grid: Grid) -> Table:
    findings = find(plan, grid)
    columns = {
        "contrast": lambda one: one.contrast.name,
        "claim": lambda one: one.contrast.claim + " (primary)" * one.contrast.primary,
        "n": lambda one: str(len(one.points)),
        "points": lambda one: f"{one.difference.mean:+.2f}" if one.difference else NONE,
        "95 %": _if_enough(lambda one: _range(one.difference)),
        "p": _if_enough(lambda one: _p(one.p_different)),
        "Holm": _if_enough(lambda one: NONE if one.adjusted is None else _p(one.adjusted)),
        "90 %": _if_enough(lambda one: _range(one.equivalence)),
        "p equal": _if_enough(lambda one: _p(one.equivalence.p)),
        "log-loss": _log_loss,
        "verdict": lambda one: one.verdict}
    notes = [*map(_meaning, findings)]
    notes += [_outcome(plan, grid), f"Differences are paired by seed, and the seed is the unit: n seeds, Student's "
              f"intervals. p: of no difference; Holm: p of the claim, over the primary contrasts; 90 % and p equal: "
              f"two one-sided tests of a difference of {plan.margin:g} points or more."]
    unfinished = sum(not run.finished for run in grid.planned)
    if unfinished:
        notes.append(f"An interim look: {unfinished} runs are not finished.")
    if plan.preregistered:
        digests = {(run.origin.get("preregistered") or {}).get("sha256") for run in grid.runs}
        is_same = len(digests) == 1 and None not in digests
        notes.append(f"Preregistered in {plan.preregistered}, " + (
            f"sha256 {digests.pop()}, as every run noted." if is_same else
            "but not every run noted the same text of it."))
    return _table("Contrasts", columns, findings, notes)


def _meaning(one: Finding) -> str:
    """The contrast in words, and what it leaves out."""
    words = f"{one.contrast.name}: {one.contrast.meaning}."
    if one.left_out:
        words += f" Left out, since a run is not finished: seed {', '.join(map(str, one.left_out))}."
    if one.unmatched:
        words += f" Left out: {one.unmatched} of the other settings' combinations, where an arm has no run."
    return words


def _if_enough(read: Callable[[Finding], str]) -> Callable[[Finding], str]:
    return lambda one: read(one) if one.is_enough else NONE


def _log_loss(one: Finding) -> str:
    if one.loss is None or one.is_enough and one.loss.n == 1:
        return NONE
    return f"{one.loss.mean:+.3f}" + (f" ({_range(one.loss, 3)})" if one.is_enough else "")


def _range(found: Summary | Equivalence, digits: int = 2) -> str:
    return f"{found.low:+.{digits}f} to {found.high:+.{digits}f}"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _outcome(plan: Plan, grid: Grid) -> str:
    """Which weights and statistics the numbers are of, as the runs recorded it."""
    weights = dict.fromkeys(f"averaged weights (ema.decay={run.settings['ema.decay']})" if run.settings.get("ema.decay")
                            else "raw weights" for run in grid.runs)
    norms = dict.fromkeys("norms calibrated" if "uncalibrated_top1" in run.result and plan.outcome == "top1" else
                          "norms as training left them" for run in grid.runs if run.finished)
    return f"Outcome: top-1 of the last step, {' or '.join(weights)}, {' or '.join(norms)}; second: log-loss."


def _results(grid: Grid, threshold: float) -> Table:
    similar = {f"similar {name} {kind}": _mean(
        partial(similar_blocks, moment=moment, kind=kind, threshold=threshold), 1)
        for moment, name in named_moments(grid).items() for kind in ("final", "softmax")}
    columns = {**_axes(grid), "top-1 %": _mean(of_result("top1"), 2), "n": lambda cell: str(len(cell.finished)),
               "95 %": _interval, **similar, "M parameters": _mean(lambda run: run.result["params"] / 1e6, 2),
               "published": lambda cell: next(
                   (f"{one.top1:.2f} [{one.source}]" for one in published_for(cell, grid)), NONE),
               "difference": lambda cell: _beyond(cell, grid), "status": lambda cell: cell.status}
    notes = [f"similar: pairs of adjacent blocks whose maps have a mean similarity M above {threshold:g}, of depth - 1 "
             f"pairs (the paper leaves its rule open: it may count a share of token vectors); final: the maps that "
             f"multiply the values, softmax: before heads are mixed and normalised. 95 %: over seeds (Student's t) for "
             f"n > 2, over the test images for n = 1; n = 2: no interval worth reading."]
    notes += [f"With {extra} changes: {', '.join(names)}." for extra, names in grid.followers.items() if names]
    return _table("Accuracy and similar blocks", columns, grid.cells, notes + _published_notes(grid))


def _similarities(grid: Grid) -> Table:
    means = {f"{KINDS[kind]} {name}": _mean(partial(mean_similarity, moment=moment, kind=kind), 2)
             for kind in KINDS for moment, name in named_moments(grid).items()}
    return _table("Mean similarity M of adjacent blocks", {**_axes(grid), **means}, grid.finished, [
        "final-1/N, softmax-1/N: of maps minus their uniform part. A norm over heads lowers M of the final maps "
        "by construction: it does so untrained, before anything was learned."])


def _others() -> Table:
    columns = {"model": lambda one: one.model, "pixels": lambda one: str(one.img_size),
               "top-1 %": lambda one: f"{one.top1:.1f} [{one.source}]",
               "parameters": lambda one: f"{one.params / 1e6:.0f}M",
               "GFLOP an image": lambda one: NONE if one.gflops is None else f"{one.gflops:g}",
               "remark": lambda one: one.remark}
    return _table("Others' models, as others trained them", columns, OTHERS, _references(OTHERS))


def _axes(grid: Grid) -> dict[str, Callable[[Cell], str]]:
    return {"depth": lambda cell: str(cell.depth), "attention": lambda cell: cell.attention,
            **{name: lambda cell, at=at: plain(cell.extras[at]) for at, name in enumerate(grid.extras)}}


def _mean(measure: Measure, digits: int) -> Callable[[Cell], str]:
    """Mean and deviation over seeds."""
    def read(cell: Cell) -> str:
        found = over_seeds(cell, measure)
        if found is None:
            return NONE
        return f"{found.mean:.0f}" if not found.std and found.mean % 1 == 0 and digits <= 1 else found.text(digits)

    return read


def mean_as(form: str, measure: Measure) -> Callable[[Cell], str]:
    return lambda cell: format(found.mean, form) if (found := over_seeds(cell, measure)) else NONE


def _interval(cell: Cell) -> str:
    low, high = interval(cell)
    return f"{low:.1f} to {high:.1f}" if low is not None else NONE


def _devices(cell: Cell) -> str:
    return "; ".join(dict.fromkeys(f"{run.result.get('devices', 1)} {run.result.get('device', NONE)}".replace(
        " 1 threads", " 1 thread") for run in cell.finished))


COSTS: dict[str, Callable[[Cell], str]] = {  # the columns of size and speed, by header
    "parameters": mean_as(",.0f", of_result("params")),
    "GFLOP an image": mean_as(".3g", lambda run: run.result.get("flops") and run.result["flops"] / 1e9),
    "images/s": _mean(of_result("images_per_s"), 0), "epochs": _mean(of_result("epochs"), 1), "device": _devices}


def _beyond(cell: Cell, grid: Grid) -> str:
    """The top-1 less the published."""
    found, top1 = published_for(cell, grid), over_seeds(cell, of_result("top1"))
    return f"{top1.mean - found[0].top1:+.2f}" if found and top1 else NONE


def _references(entries: Iterable[Published]) -> list[str]:
    return [f"[{name}] {SOURCES[name]}." for name in dict.fromkeys(one.source for one in entries)]


def _published_notes(grid: Grid) -> list[str]:
    found = [entries for cell in grid.cells if (entries := published_for(cell, grid))]
    if not found and grid.data != "imagenet":
        return [f"The paper reports results on ImageNet only: it has no number for {grid.data}."]
    notes = _references(chain.from_iterable(found))
    notes += [f"Also published for {first.model}: {', '.join(f'{one.top1:g} [{one.source}]' for one in more)}."
              for first, *more in found if more]
    if counts := [f"{one.model} {one.similar_blocks}" for one, *_ in found if one.similar_blocks is not None]:
        notes.append(f"Similar blocks as published, by a rule that is not stated: {', '.join(counts)}.")
    if times := dict.fromkeys(f"{one.model} on {one.match['data.source']} {one.time}" for one, *_ in found if one.time):
        notes.append(f"Training time as published, on a GPU that is not named: {', '.join(times)}.")
    return notes
