"""Tables as lines of text, in a terminal or in markdown; cells as CSV."""

import csv
import io
import re
import textwrap
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain, product

import rich.table
from rich import box
from rich.console import Console

from deepvit.report.grid import Cell, Grid
from deepvit.report.tables import (KINDS, MOMENTS, NONE, Measure, interval, mean_similarity, of_result, over_seeds,
                                   published_for, similar_blocks)

NUMBER = re.compile(r"[-+<]? ?\d|$|" + NONE)  # cells that begin so are aligned to the right


def printed(headers: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """A table as lines, numbers to the right. In a terminal, headers wider than their column are broken at spaces."""
    drawn = rich.table.Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD, pad_edge=markdown,
                             padding=(0, 1) if markdown else (0, 1, 0, 0))
    right = []
    for index, header in enumerate(headers):
        cells = [row[index] for row in rows]
        width = max(map(len, [*header.split(" "), *cells]))
        right.append(are_numbers(cells))
        drawn.add_column(header if markdown else textwrap.fill(header, width, break_on_hyphens=False),
                         justify="right" if right[-1] else "left", vertical="bottom", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    console = Console(file=io.StringIO(), width=100_000, markup=False, emoji=False, highlight=False)
    console.print(drawn)
    lines = [line.rstrip() for line in console.file.getvalue().split("\n") if line.strip()]
    if markdown:
        rules = zip(lines[1].split("|")[1:], right)
        lines[1] = f"|{'|'.join(rule[is_right:] + ':' * is_right for rule, is_right in rules)}|"
    return "\n".join(lines)


def are_numbers(cells: Iterable[str]) -> bool:
    return all(map(NUMBER.match, cells))


def as_csv(grids: Sequence[Grid], threshold: float) -> str:
    """A row for each cell, of plain numbers."""
    rows = [_csv_row(grid, cell, threshold) for grid in grids for cell in grid.cells]
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(chain.from_iterable(rows)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_row(grid: Grid, cell: Cell, threshold: float) -> dict[str, object]:
    row = {"data": grid.data, "recipe": grid.recipe, "experiment": grid.label, "depth": cell.depth,
           "attention": cell.attention, **cell.settings, "n": len(cell.finished), "status": cell.status or "finished",
           "seeds": " ".join(str(run.seed) for run in cell.finished),
           "folders": " ".join(run.place for run in cell.runs)}
    row |= _mean_and_std("top1", cell, of_result("top1"))
    row["top1_low"], row["top1_high"] = interval(cell)
    for moment, kind in product(MOMENTS, KINDS):
        which = {"moment": moment, "kind": kind}
        row |= _mean_and_std(f"similar_blocks_{moment}_{kind}", cell,
                             partial(similar_blocks, **which, threshold=threshold))
        row |= _mean_and_std(f"similarity_{moment}_{kind}", cell, partial(mean_similarity, **which))
    for name in ("params", "flops", "images_per_s", "epochs", "steps"):
        row[name] = getattr(over_seeds(cell, of_result(name)), "mean", None)
    for first in published_for(cell, grid)[:1]:
        row |= {"published_top1": first.top1, "published_source": first.source,
                "published_similar_blocks": first.similar_blocks}
    return row


def _mean_and_std(name: str, cell: Cell, measure: Measure) -> dict[str, float | None]:
    summary = over_seeds(cell, measure)
    return {f"{name}_{what}": getattr(summary, what, None) for what in ("mean", "std")}
