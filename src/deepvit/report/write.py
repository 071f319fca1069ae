"""The report: what is printed, and the files report.md, report.csv, report.html and figures/."""

import itertools
import re
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from deepvit.config.provenance import git_revision
from deepvit.errors import UserError
from deepvit.report import page, render, sentences
from deepvit.report.compare import comparison, comparison_chart
from deepvit.report.figures import charts
from deepvit.report.grid import grids
from deepvit.report.chart import Chart
from deepvit.report.runs import Run, without_paths
from deepvit.report.tables import Table, tables

TITLE = "Depth and attention: report"
ANY_NAME = {"encoding": "utf-8", "errors": "backslashreplace"}  # a folder's name may be no UTF-8

Part = str | Table | Chart  # of a report; a text that begins with ## is a heading


def write_report(runs: Sequence[Run], problems: Sequence[str], out: Path, threshold: float,
                 pair: Sequence[Run] = (), command: str = "deepvit report") -> Iterator[str]:
    """Writes everything into `out` and gives the lines to print. `pair`: two runs to compare, or none. Raises UserError
    if `out` cannot be written, or has files of these names that no report wrote."""
    _refuse_strange(out)
    found = grids(runs)
    made = f"Made {time.strftime('%Y-%m-%d %H:%M %z')} by `{without_paths(command)}` at revision " \
           f"{git_revision() or 'unknown'}. {sentences.revisions(found)}"
    parts = [sentences.summary(found), made.strip(), *problems,
             *itertools.chain.from_iterable(grid.duplicates for grid in found)]
    for number, grid in enumerate(found, 1):
        name = re.sub(r"[^A-Za-z0-9]+", "-", f"{grid.data}-{grid.recipe}-{grid.label}")[:40].strip("-")
        parts += [f"## {grid.name}", sentences.shared_recipe(grid), sentences.limits(grid), *tables(grid, threshold),
                  *charts(grid, threshold, f"{name}-{number}-" if len(found) > 1 else "")]
    parts += [comparison(pair), comparison_chart(pair)] if pair else []
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        saved = [part.save(out / "figures") for part in parts if isinstance(part, Chart)]
        (out / "report.csv").write_text(render.as_csv(found, threshold), **ANY_NAME)
        (out / "report.md").write_text("\n\n".join([f"# {TITLE}", *map(_as_markdown, parts)]) + "\n", **ANY_NAME)
        (out / "report.html").write_text(page.page(TITLE, [*map(_as_html, parts)]), **ANY_NAME)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another folder with --out.") from error
    yield from (text for part in parts if (text := _as_text(part)))
    yield from (f"Figure: {path}" for path in saved)
    yield f"Report: {out / 'report.html'} (and report.md, report.csv)"


def _refuse_strange(out: Path) -> None:
    try:
        is_ours = (out / "report.md").read_text(errors="replace").startswith(f"# {TITLE}")
    except OSError:
        is_ours = False
    there = [name for name in ("report.csv", "report.md", "report.html", "figures") if (out / name).exists()]
    if there and not is_ours:
        raise UserError(f"{out / there[0]} is not of a report, and would be overwritten: choose another folder with "
                        f"--out.")


def _as_text(part: Part) -> str:
    """For a terminal: without figures and what is seldom asked for."""
    if isinstance(part, Table):
        return "\n".join(["", render.as_text(part), *part.notes]) if part.title != "Size and speed" else ""
    return part.replace("## ", "\n") if isinstance(part, str) else ""


def _as_markdown(part: Part) -> str:
    if isinstance(part, Chart):
        return f"![{part.caption}](figures/{part.name}.png)\n\n{part.caption}"
    return render.as_markdown(part).strip() if isinstance(part, Table) else part


def _as_html(part: Part) -> str:
    if isinstance(part, Chart):
        return page.figure(part)
    if isinstance(part, Table):
        return render.as_html(part)
    return f"<h2>{escape(part[3:])}</h2>" if part.startswith("## ") else f"<p>{escape(part)}</p>"
