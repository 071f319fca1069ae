"""Tables as text for a terminal, as markdown, as HTML; cells as CSV."""

import csv
import html
import io
from collections.abc import Sequence

from deepvit.report.grid import Cell, Grid
from deepvit.report.statistics import Summary
from deepvit.report.tables import (
    KINDS,
    MOMENTS,
    Table,
    interval,
    mean_similarity,
    of_result,
    over_seeds,
    published_for,
    similar_blocks,
)

LEFT_ALIGNED = ("attention", "published", "status", "device", "setting", "A", "B")


def as_text(table: Table) -> str:
    """For a terminal: headers broken into lines at spaces, columns as narrow as they can be."""
    headers = [header.split(" ") for header in table.headers]
    height = max(map(len, headers))
    padded = [[""] * (height - len(words)) + words for words in headers]
    lines = [list(line) for line in zip(*padded)]
    widths = [max(len(row[index]) for row in [*lines, *table.rows]) for index in range(len(headers))]
    drawn = [_line(line, widths, table.headers) for line in lines]
    drawn += ["  ".join("-" * width for width in widths)]
    drawn += [_line(row, widths, table.headers) for row in table.rows]
    return "\n".join([table.title, *drawn])


def _line(words: Sequence[str], widths: Sequence[int], headers: Sequence[str]) -> str:
    return "  ".join(word.ljust(width) if header in LEFT_ALIGNED else word.rjust(width)
                     for word, width, header in zip(words, widths, headers)).rstrip()


def as_markdown(table: Table) -> str:
    def row(words: Sequence[str]) -> str:
        return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"

    ruler = row([":--" if header in LEFT_ALIGNED else "--:" for header in table.headers])
    notes = "\n".join(f"- {note}" for note in table.notes)
    return "\n".join([f"### {table.title}", "", row(table.headers), ruler, *map(row, table.rows), "", notes, ""])


def as_html(table: Table) -> str:
    def row(words: Sequence[str], tag: str) -> str:
        cells = (f'<{tag}{_class(header, word)}>{html.escape(word)}</{tag}>'
                 for header, word in zip(table.headers, words))
        return f"<tr>{''.join(cells)}</tr>"

    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    return (f'<h3>{html.escape(table.title)}</h3><div class="scroll"><table><thead>{row(table.headers, "th")}</thead>'
            f'<tbody>{"".join(row(words, "td") for words in table.rows)}</tbody></table></div>'
            f'<ul class="notes">{notes}</ul>')


def _class(header: str, word: str) -> str:
    names = ["left"] * (header in LEFT_ALIGNED) + ["open"] * (header == "status" != word)
    return f' class="{" ".join(names)}"' if names else ""


def as_csv(grids: Sequence[Grid], threshold: float) -> str:
    """A row for each cell: plain numbers, a column for each mean, deviation, count and bound."""
    rows = [_csv_row(grid, cell, threshold) for grid in grids for cell in grid.cells]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_row(grid: Grid, cell: Cell, threshold: float) -> dict[str, object]:
    row = {"data": grid.data, "recipe": grid.recipe, "depth": cell.depth, "attention": cell.attention,
           **dict(zip(grid.extras, cell.extras)), "n": len(cell.finished), "status": cell.status or "finished",
           "seeds": " ".join(str(run.config.get("seed")) for run in cell.finished)}
    row |= _summary_columns("top1", over_seeds(cell, of_result("top1")))
    row["top1_low"], row["top1_high"] = interval(cell)
    for moment in MOMENTS:
        for kind in KINDS:
            row |= _summary_columns(f"similar_blocks_{moment}_{kind}", over_seeds(
                cell, lambda run, m=moment, k=kind: similar_blocks(run, m, k, threshold)))
            row |= _summary_columns(f"similarity_{moment}_{kind}", over_seeds(
                cell, lambda run, m=moment, k=kind: mean_similarity(run, m, k)))
    for name in ("params", "flops", "images_per_s", "epochs", "steps"):
        summary = over_seeds(cell, of_result(name))
        row[name] = summary.mean if summary else None
    found = published_for(cell, grid)
    if found:
        row |= {"published_top1": found[0].top1, "published_source": found[0].source,
                "published_similar_blocks": found[0].similar_blocks}
    return row


def _summary_columns(name: str, summary: Summary | None) -> dict[str, float | None]:
    return {f"{name}_mean": summary.mean if summary else None, f"{name}_std": summary.std if summary else None}
