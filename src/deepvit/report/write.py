"""The report: what is printed, and the files report.md, report.csv, report.html and figures/."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from deepvit.errors import UserError
from deepvit.report import page, render, sentences
from deepvit.report.figures import Picture, pictures
from deepvit.report.grid import Grid, grids
from deepvit.report.runs import Run
from deepvit.report.tables import tables


def write_report(runs: Sequence[Run], problems: Sequence[str], out: Path, threshold: float,
                 compare: Sequence[Path] | None = None) -> Iterator[str]:
    """Writes everything into `out` and gives the lines to print.

    Raises:
        UserError: `out` cannot be written.
    """
    found = grids(runs)
    problems = [*problems, *(line for grid in found for line in grid.duplicates)]
    drawn = {id(grid): pictures(grid, _prefix(grid, found)) for grid in found}
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        saved = [picture.save(out / "figures") for each in drawn.values() for picture in each]
        (out / "report.csv").write_text(render.as_csv(found, threshold))
        (out / "report.md").write_text(_markdown(found, drawn, problems, threshold))
        (out / "report.html").write_text(_html(found, drawn, problems, threshold))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another folder with --out.") from error
    yield from _terminal(found, threshold, problems)
    yield from (f"Figure: {path}" for path in saved)
    yield f"Report: {out / 'report.html'} (and report.md, report.csv)"


def _prefix(grid: Grid, found: Sequence[Grid]) -> str:
    """Of the names of a grid's figures, where there are several grids."""
    if len(found) == 1:
        return ""
    words = f"{grid.data}-{grid.recipe or found.index(grid)}"
    return "".join(letter if letter.isalnum() else "-" for letter in words) + "-"


def _several(found: Sequence[Grid]) -> str | None:
    if len(found) == 1:
        return None
    return (f"The runs are of {len(found)} kinds of data or recipe ({'; '.join(grid.name for grid in found)}): a table "
            f"for each, since their numbers do not compare.")


def _terminal(found: Sequence[Grid], threshold: float, problems: Sequence[str]) -> Iterator[str]:
    if _several(found):
        yield _several(found)
    for grid in found:
        results, similarities, _ = tables(grid, threshold)
        yield "\n" + render.as_text(results)
        yield from results.notes
        if similarities.rows:
            yield "\n" + render.as_text(similarities)
            yield from similarities.notes
        yield "\n" + sentences.shared_recipe(grid)
        yield from sentences.reading(grid)
    yield from problems


def _markdown(found: Sequence[Grid], drawn: dict[int, list[Picture]], problems: Sequence[str],
              threshold: float) -> str:
    parts = ["# Report", *filter(None, [_several(found)]), *(f"- {problem}" for problem in problems)]
    for grid in found:
        parts += [f"## {grid.name}", sentences.shared_recipe(grid), *sentences.reading(grid)]
        parts += [render.as_markdown(table) for table in tables(grid, threshold) if table.rows]
        parts += [f"![{picture.caption}](figures/{picture.name}.png)\n\n{picture.caption}"
                  for picture in drawn[id(grid)]]
    return "\n\n".join(parts) + "\n"


def _html(found: Sequence[Grid], drawn: dict[int, list[Picture]], problems: Sequence[str], threshold: float) -> str:
    parts = [page.paragraph(text) for text in (_several(found), *problems) if text]
    for grid in found:
        results, *others = [render.as_html(table) for table in tables(grid, threshold) if table.rows]
        texts = [page.paragraph(text) for text in (sentences.shared_recipe(grid), *sentences.reading(grid))]
        figures = [page.figure(picture) for picture in drawn[id(grid)]]
        folders = page.listing(f"The {len(grid.runs)} run folders", [str(run.path) for run in grid.runs])
        parts += [page.heading(grid.name), results, *texts, *figures, *others, folders]
    return page.page("Depth and attention: report", parts)
