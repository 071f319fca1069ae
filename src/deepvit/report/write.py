"""The report: what is printed, and the files report.md, report.csv, report.html and figures/."""

import itertools
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepvit.config.provenance import git_revision
from deepvit.errors import UserError
from deepvit.report import page, render, sentences
from deepvit.report.compare import comparison, comparison_picture
from deepvit.report.figures import pictures
from deepvit.report.grid import Grid, grids
from deepvit.report.picture import Picture
from deepvit.report.runs import Run, without_paths
from deepvit.report.tables import tables

TITLE = "# Depth and attention: report"
ANY_NAME = {"encoding": "utf-8", "errors": "backslashreplace"}  # a folder's name may be no UTF-8


@dataclass(frozen=True)
class Report:
    """What goes into every form of it. `pair`: two runs to compare, or none; `made`: when, by what command."""

    grids: list[Grid]
    pictures: list[list[Picture]]  # of each grid
    problems: list[str]
    threshold: float
    pair: Sequence[Run]
    made: str

    @property
    def remarks(self) -> list[str]:
        """What a reader must know of the whole."""
        return [sentences.summary(self.grids), f"{self.made} {sentences.revisions(self.grids)}", *self.problems]


def write_report(runs: Sequence[Run], problems: Sequence[str], out: Path, threshold: float,
                 pair: Sequence[Run] = (), command: str = "deepvit report") -> Iterator[str]:
    """Writes everything into `out` and gives the lines to print.

    Raises:
        UserError: `out` cannot be written, or has files of these names that no report wrote.
    """
    _refuse_strange(out)
    found = grids(runs)
    drawn = [pictures(grid, threshold, _prefix(grid, found)) for grid in found]
    made = f"Made {time.strftime('%Y-%m-%d %H:%M %z')} by `{without_paths(command)}` at revision " \
           f"{git_revision() or 'unknown'}."
    report = Report(found, drawn, [*problems, *(line for grid in found for line in grid.duplicates)], threshold, pair,
                    made)
    extra = [comparison_picture(pair)] if pair else []
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        saved = [picture.save(out / "figures") for picture in [*itertools.chain(*drawn), *extra]]
        (out / "report.csv").write_text(render.as_csv(found, threshold), **ANY_NAME)
        (out / "report.md").write_text(_markdown(report, extra), **ANY_NAME)
        (out / "report.html").write_text(_html(report, extra), **ANY_NAME)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another folder with --out.") from error
    yield from _terminal(report)
    yield from (f"Figure: {path}" for path in saved)
    yield f"Report: {out / 'report.html'} (and report.md, report.csv)"


def _refuse_strange(out: Path) -> None:
    page = out / "report.md"
    try:
        is_ours = page.read_text(errors="replace").startswith(TITLE)
    except OSError:
        is_ours = False
    there = [name for name in ("report.csv", "report.md", "report.html", "figures") if (out / name).exists()]
    if there and not is_ours:
        raise UserError(f"{out / there[0]} is not of a report, and would be overwritten: choose another folder with "
                        f"--out.")


def _prefix(grid: Grid, found: Sequence[Grid]) -> str:
    """Of the names of a grid's figures, where there are several grids."""
    if len(found) == 1:
        return ""
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{grid.data}-{grid.recipe or 'own'}-{grid.label}")[:60].strip("-") + f"-{found.index(grid) + 1}-"


def _terminal(report: Report) -> Iterator[str]:
    yield from report.remarks
    for grid in report.grids:
        for table in tables(grid, report.threshold):
            if not table.title.startswith("Size"):
                yield "\n" + render.as_text(table)
                yield from table.notes
        yield "\n" + sentences.shared_recipe(grid)
        yield sentences.limits(grid)
    if report.pair:
        compared = comparison(report.pair)
        yield "\n" + render.as_text(compared)
        yield from compared.notes


def _markdown(report: Report, extra: Sequence[Picture]) -> str:
    parts = [TITLE, *(f"- {remark}" for remark in report.remarks)]
    for grid, drawn in zip(report.grids, report.pictures):
        parts += [f"## {grid.name}", sentences.shared_recipe(grid), sentences.limits(grid)]
        parts += [render.as_markdown(table) for table in tables(grid, report.threshold)]
        parts += map(_markdown_picture, drawn)
    if report.pair:
        parts += [render.as_markdown(comparison(report.pair)), *map(_markdown_picture, extra)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _markdown_picture(picture: Picture) -> str:
    return f"![{picture.caption}](figures/{picture.name}.png)\n\n{picture.caption}"


def _html(report: Report, extra: Sequence[Picture]) -> str:
    parts = [page.paragraph(text) for text in report.remarks]
    for grid, drawn in zip(report.grids, report.pictures):
        results, *others = [render.as_html(table) for table in tables(grid, report.threshold)]
        texts = [page.paragraph(text) for text in (sentences.shared_recipe(grid), sentences.limits(grid))]
        folders = page.listing(f"The {len(grid.runs)} run folders", [run.place for run in grid.runs])
        parts += [page.heading(grid.name), results, *texts, *map(page.figure, drawn), *others, folders]
    if report.pair:
        parts += [render.as_html(comparison(report.pair)), *map(page.figure, extra)]
    return page.page("Depth and attention: report", parts)
