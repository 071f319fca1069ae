"""A grid as tables: what each column says, and the sentences below them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from deepvit.report.contrasts import OUTCOMES, Finding, Plan, find, plan_of
from deepvit.report.grid import Cell, Grid, plain
from deepvit.report.published import IMAGENET_VAL, Published, others, published_of, sources
from deepvit.report.runs import Run
from deepvit.report.statistics import Summary, summarise

MOMENTS = {"initial": "untrained", "final": "trained"}
KINDS = {"final": "final", "softmax": "softmax", "final_centred": "final-1/N", "softmax_centred": "softmax-1/N"}
NONE = "–"


@dataclass(frozen=True)
class Table:
    """Text in rows under headers; `notes` are sentences below."""

    title: str
    headers: Sequence[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def similarity(run: Run, moment: str, kind: str) -> list[float]:
    """M of each pair of adjacent blocks (mean over pictures, heads and tokens), empty if it was not measured.

    Args:
        moment: initial (before the first step) or final (after the last).
        kind: final or softmax, each also as `_centred` (maps minus 1/N).
    """
    found = (run.result.get(f"probe_{moment}") or {}).get("similarity", {}).get(kind) or {}
    return [value for value in found.get("adjacent", []) if value is not None]


def similar_blocks(run: Run, moment: str, kind: str, threshold: float) -> int | None:
    """Adjacent pairs whose M is above `threshold` (the paper leaves open how it counts)."""
    pairs = similarity(run, moment, kind)
    return sum(value > threshold for value in pairs) if pairs else None


def mean_similarity(run: Run, moment: str, kind: str) -> float | None:
    pairs = similarity(run, moment, kind)
    return sum(pairs) / len(pairs) if pairs else None


def over_seeds(cell: Cell, measure: Callable[[Run], float | None]) -> Summary | None:
    return summarise([measure(run) for run in cell.finished])


def of_result(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.result.get(name)


def published_for(cell: Cell, grid: Grid) -> list[Published]:
    """The paper's numbers for a cell, unless a cell of its row was evaluated on a part of ImageNet."""
    same = [run for other in grid.cells if (other.attention, other.extras) == (cell.attention, cell.extras)
            for run in other.runs]
    return [] if any(map(_is_part_of_imagenet, same)) else published_of(cell.runs[0].settings)


def _is_part_of_imagenet(run: Run) -> bool:
    """Any folder can be given as data=imagenet."""
    return run.settings.get("data.source") == "imagenet" and run.result.get("n", IMAGENET_VAL) != IMAGENET_VAL


def tables(grid: Grid, threshold: float) -> list[Table]:
    """The grid's results, the similarities behind them, and on ImageNet what others report."""
    more = [_others()] if grid.data == "imagenet" else []
    found = [*_contrasts(grid), _results(grid, threshold), _similarities(grid), _costs(grid), *more]
    return [_without_empty(table) for table in found if table.rows]


def _contrasts(grid: Grid) -> list[Table]:
    """None where the sweep names none."""
    plan = plan_of(grid)
    if plan is None:
        return []
    findings = find(plan, grid)
    headers = ["contrast", "claim", "n", "points", "95 %", "p", "Holm", "90 %", "p equal", "log-loss", "verdict"]
    rows = [[one.contrast.name, one.contrast.claim + " (primary)" * one.contrast.primary, str(len(one.points)),
             *_tests(one), one.verdict] for one in findings]
    unfinished = sum(not run.finished for run in grid.planned)
    notes = [f"{one.contrast.name}: {one.contrast.meaning}." + (
        f" Left out, since a run is not finished: seed {', '.join(map(str, one.left_out))}." if one.left_out else "")
        for one in findings]
    notes += [_outcome(plan, grid), f"Differences are paired by seed, and the seed is the unit: n seeds, Student's "
              f"intervals. p: of no difference; Holm: p of the claim, over the primary contrasts; 90 % and p equal: "
              f"two one-sided tests of a difference of {plan.margin:g} points or more."]
    notes += [f"An interim look: {unfinished} runs are not finished."] if unfinished else []
    notes += [_preregistration(plan, grid)] if plan.preregistered else []
    return [Table("Contrasts", headers, rows, notes)]


def _preregistration(plan: Plan, grid: Grid) -> str:
    digests = {(run.origin.get("preregistered") or {}).get("sha256") for run in grid.runs}
    same = f"sha256 {next(iter(digests))}, as every run noted" if len(digests) == 1 and None not in digests else (
        "but not every run noted the same text of it")
    return f"Preregistered in {plan.preregistered}, {same}."


def _tests(one: Finding) -> list[str]:
    loss = summarise([*one.losses.values()])
    if not one.is_enough:
        return [f"{one.difference.mean:+.2f}" if one.difference else NONE, *[NONE] * 5,
                f"{loss.mean:+.3f}" if loss else NONE]
    inner = one.equivalence
    return [f"{one.difference.mean:+.2f}", _range(one.difference.low, one.difference.high, 2), _p(one.p_different),
            NONE if one.adjusted is None else _p(one.adjusted), _range(inner.low, inner.high, 2), _p(inner.p),
            f"{loss.mean:+.3f} ({_range(loss.low, loss.high, 3)})" if loss and loss.n > 1 else NONE]


def _range(low: float, high: float, digits: int) -> str:
    return f"{low:+.{digits}f} to {high:+.{digits}f}"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _outcome(plan: Plan, grid: Grid) -> str:
    """Of which weights and statistics the numbers are, as the runs recorded it."""
    weights = dict.fromkeys(f"averaged weights (ema.decay={run.settings['ema.decay']})" if run.settings.get("ema.decay")
                            else "raw weights" for run in grid.runs)
    norms = dict.fromkeys("norms calibrated" if "uncalibrated_top1" in run.result and plan.outcome == "top1" else
                          "norms as training left them" for run in grid.runs if run.finished)
    return f"Outcome: {OUTCOMES[plan.outcome]}, {' or '.join(weights)}, {' or '.join(norms)}; second: log-loss."


def _results(grid: Grid, threshold: float) -> Table:
    headers = [*_axes(grid), "top-1 %", "n", "95 %", *(f"similar {moment} {kind}" for moment in MOMENTS.values()
                                                     for kind in ("final", "softmax")),
               "M parameters", "published", "difference", "status"]
    rows = [[*_place(cell), _top1(cell), str(len(cell.finished)), _interval(cell),
             *(_text(over_seeds(cell, lambda run, m=moment, k=kind: similar_blocks(run, m, k, threshold)), 1)
               for moment in MOMENTS for kind in ("final", "softmax")),
             _text(over_seeds(cell, lambda run: run.result["params"] / 1e6), 2), *_published(cell, grid), cell.status]
            for cell in grid.cells]
    notes = [f"similar: pairs of adjacent blocks whose maps have a mean similarity M above {threshold:g}, of depth - 1 "
             f"pairs (the paper leaves its rule open: it may count a share of token vectors); final: the maps that "
             f"multiply the values, softmax: before heads are mixed and normalised. 95 %: over seeds (Student's t) for "
             f"n > 2, over the test images for n = 1; n = 2: no interval worth reading."]
    notes += [f"With {extra} changes: {', '.join(names)}." for extra, names in grid.followers.items() if names]
    return Table("Accuracy and similar blocks", headers, rows, notes + _published_notes(grid))


def _similarities(grid: Grid) -> Table:
    headers = [*_axes(grid), *(f"{kind} {moment}" for kind in KINDS.values() for moment in MOMENTS.values())]
    rows = [[*_place(cell), *(_text(over_seeds(cell, lambda run, m=moment, k=kind: mean_similarity(run, m, k)), 2)
                              for kind in KINDS for moment in MOMENTS)] for cell in grid.cells if cell.finished]
    return Table("Mean similarity M of adjacent blocks", headers, rows, [
        "final-1/N, softmax-1/N: of maps minus their uniform part. A norm over heads lowers M of the final maps "
        "by construction: it does so untrained, before anything was learned."])


def _costs(grid: Grid) -> Table:
    headers = [*_axes(grid), "parameters", "GFLOP an image", "images/s", "epochs", "device"]
    rows = [[*_place(cell), *_counts(cell)] for cell in grid.cells if cell.finished]
    return Table("Size and speed", headers, rows, [
        "GFLOP: forward, one image. images/s: training, as these runs met their machines; not a benchmark."])


def _others() -> Table:
    rows = [[one.model, f"{one.img_size}", f"{one.top1:.1f} [{one.source}]", f"{one.params / 1e6:.0f}M",
             NONE if one.gflops is None else f"{one.gflops:g}", one.remark] for one in others()]
    named = dict.fromkeys(one.source for one in others())
    headers = ["model", "pixels", "top-1 %", "parameters", "GFLOP an image", "remark"]
    return Table("Others' models, as others trained them", headers, rows,
                 [f"[{name}] {sources()[name]}." for name in named])


def _counts(cell: Cell) -> list[str]:
    flops = over_seeds(cell, lambda run: run.result.get("flops") and run.result["flops"] / 1e9)
    devices = dict.fromkeys(f"{run.result.get('devices', 1)} {run.result.get('device', NONE)}".replace(
        " 1 threads", " 1 thread") for run in cell.finished)
    params = over_seeds(cell, of_result("params"))
    return [f"{params.mean:,.0f}" if params else NONE, f"{flops.mean:.3g}" if flops else NONE,
            _text(over_seeds(cell, of_result("images_per_s")), 0), _text(over_seeds(cell, of_result("epochs")), 1),
            "; ".join(devices)]


def _axes(grid: Grid) -> list[str]:
    return ["depth", "attention", *grid.extras]


def _place(cell: Cell) -> list[str]:
    return [str(cell.depth), cell.attention, *map(plain, cell.extras)]


def _text(summary: Summary | None, digits: int) -> str:
    if summary is None:
        return NONE
    if summary.std in (None, 0.0) and summary.mean == round(summary.mean) and digits <= 1:
        return f"{summary.mean:.0f}"
    return summary.text(digits)


def _top1(cell: Cell) -> str:
    return _text(over_seeds(cell, of_result("top1")), 2)


def _interval(cell: Cell) -> str:
    low, high = interval(cell)
    return f"{low:.1f} to {high:.1f}" if low is not None else NONE


def interval(cell: Cell) -> tuple[float | None, float | None]:
    """95 % interval of the top-1: of the mean over three seeds or more, or of the one run's share of right images."""
    summary = over_seeds(cell, of_result("top1"))
    if summary is None or summary.n == 2:
        return None, None
    if summary.n > 2:
        return max(summary.low, 0.0), min(summary.high, 100.0)
    result = cell.finished[0].result
    return result.get("top1_low"), result.get("top1_high")


def _published(cell: Cell, grid: Grid) -> list[str]:
    found = published_for(cell, grid)
    if not found:
        return [NONE, NONE]
    top1 = over_seeds(cell, of_result("top1"))
    return [f"{found[0].top1:.2f} [{found[0].source}]", f"{top1.mean - found[0].top1:+.2f}" if top1 else NONE]


def _published_notes(grid: Grid) -> list[str]:
    found = [published_for(cell, grid) for cell in grid.cells]
    named = dict.fromkeys(entry.source for entries in found for entry in entries)
    notes = [f"[{name}] {sources()[name]}." for name in named]
    notes += [f"Also published for {entries[0].model}: " + ", ".join(
        f"{entry.top1:g} [{entry.source}]" for entry in entries[1:]) + "."
        for entries in found if len(entries) > 1]
    counts = [f"{entries[0].model} {entries[0].similar_blocks}" for entries in found
              if entries and entries[0].similar_blocks is not None]
    if counts:
        notes.append(f"Similar blocks as published, by a rule that is left open: {', '.join(counts)}.")
    times = dict.fromkeys(f"{entries[0].model} on {entries[0].match['data.source']} {entries[0].time}"
                          for entries in found if entries and entries[0].time)
    if times:
        notes.append(f"Training time as published, of a GPU that is not named: {', '.join(times)}.")
    if not named and grid.data != "imagenet":
        notes.append(f"The paper's numbers are of ImageNet: there is none to stand beside {grid.data}.")
    return notes


def _without_empty(table: Table) -> Table:
    """Without columns that say nothing."""
    kept = [index for index in range(len(table.headers)) if any(row[index] not in ("", NONE) for row in table.rows)]
    return Table(table.title, [table.headers[index] for index in kept],
                 [[row[index] for index in kept] for row in table.rows], table.notes)
