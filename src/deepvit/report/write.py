"""The report: what is printed, and the files report.md, report.csv, report.html and figures/."""

import base64
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from html import escape
from itertools import chain
from pathlib import Path
from string import Template

from deepvit.config.compare import flat, labels
from deepvit.config.provenance import git_revision
from deepvit.config.records import check_writable
from deepvit.errors import UserError, writing
from deepvit.report.figures import Chart, charts, comparison_chart
from deepvit.report.grid import Grid, differing, grids, plain
from deepvit.report.render import are_numbers, as_csv, printed
from deepvit.report.runs import Run, without_paths
from deepvit.report.tables import NONE, Table, mean_similarity, of_result, over_seeds, tables

TITLE = "Depth and attention: report"
PAGE = Template(Path(__file__).with_name("page.html").read_text())  # needs no other file, and a phone can show it
ANY_NAME = {"encoding": "utf-8", "errors": "backslashreplace"}  # a folder's name may not be UTF-8
RECIPE = (  # what a reader asks for first
    "model.embed_dim", "model.num_heads", "model.mlp_ratio", "model.img_size", "model.patch_size", "model.stem",
    "model.reattention_blocks", "model.drop_path_rate", "data.fraction", "data.batch_size", "schedule.epochs",
    "schedule.steps", "schedule.kind", "optimizer.opt", "optimizer.lr", "optimizer.weight_decay", "augment",
    "precision", "ema.decay", "loss.cosine_blocks", "init")
IMAGES = tuple(f"data.{name}" for name in (  # settings that choose them
    "source", "name", "classes", "fraction", "val_fraction", "exclude", "train_split", "val_split"))
RESULTS = ("top1", "top5", "loss", "best_top1", "n", "params", "flops", "steps", "epochs", "images_per_s", "git")

Part = str | Table | Chart  # a text that begins with ## is a heading


def write_report(runs: Sequence[Run], problems: Sequence[str], out: Path, threshold: float, pair: Sequence[Run],
                 command: str) -> Iterator[str]:
    """Writes everything into `out` and yields the lines to print. `pair`: two runs to compare, or none. Raises
    UserError if `out` cannot be written, or has files of these names that no report wrote."""
    _refuse_strange(out)
    with writing("The report", out, "choose another folder with --out"):
        check_writable(out)
    found = grids(runs)
    parts = [_summary(found), _origin(found, command), *problems, *chain(*(grid.duplicates for grid in found))]
    for number, grid in enumerate(found, 1):
        name = re.sub(r"[^A-Za-z0-9]+", "-", f"{grid.data}-{grid.recipe}-{grid.label}")[:40].strip("-")
        parts += [f"## {grid.name}", _shared_recipe(grid), _limits(grid), *tables(grid, threshold),
                  *charts(grid, f"{name}-{number}-" if len(found) > 1 else "")]
    parts += [_comparison(pair), comparison_chart(pair, _labels(pair))] if pair else []
    with writing("The report", out, "choose another folder with --out"):
        (out / "figures").mkdir(parents=True, exist_ok=True)
        saved = [part.save(out / "figures") for part in parts if isinstance(part, Chart)]
        (out / "report.csv").write_text(as_csv(found, threshold), **ANY_NAME)
        (out / "report.md").write_text("\n\n".join([f"# {TITLE}", *map(as_markdown, parts)]) + "\n", **ANY_NAME)
        (out / "report.html").write_text(PAGE.substitute(title=TITLE, parts="".join(map(as_html, parts))), **ANY_NAME)
    yield from filter(None, map(as_text, parts))
    yield from (f"Figure: {path}" for path in saved)
    yield f"Report: {out / 'report.html'} (and report.md, report.csv)"


def _refuse_strange(out: Path) -> None:
    with suppress(OSError):
        if (out / "report.md").read_text(errors="replace").startswith(f"# {TITLE}"):
            return
    for name in ("report.csv", "report.md", "report.html", "figures"):
        if (out / name).exists():
            raise UserError(f"{out / name} was not written by a report, and would be overwritten: choose another "
                            f"folder with --out.")


def _summary(grids: Sequence[Grid]) -> str:
    """How many runs there are and how they went; of one experiment also its best cell."""
    runs = [run for grid in grids for run in grid.planned]
    states = Counter(run.state.split(" (")[0] for run in runs)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    total = f"{len(runs)} run{'s' * (len(runs) != 1)} ({counts})"
    if len(grids) > 1:
        return f"{total} in {len(grids)} experiments, with separate tables: their numbers are not comparable."
    means = [(found.mean, cell) for cell in grids[0].cells if (found := over_seeds(cell, of_result("top1")))]
    if not means:
        return f"{total}."
    highest, cell = max(means, key=lambda one: one[0])
    where = ", ".join([cell.attention, f"{cell.depth} blocks", *cell.details(grids[0])])
    return f"{total}. The highest top-1 is {highest:.2f} %: {where}."


def _origin(grids: Sequence[Grid], command: str) -> str:
    """When and by what the report was made, and of which code its runs are."""
    named = dict.fromkeys(run.result.get("git") or "unknown" for grid in grids for run in grid.runs if run.finished)
    return (f"Made {time.strftime('%Y-%m-%d %H:%M %z')} by `{without_paths(command)}` at revision "
            f"{git_revision() or 'unknown'}.") + (f" The runs are of revision {', '.join(named)}." if named else "")


def _shared_recipe(grid: Grid) -> str:
    """The settings that all cells have in common."""
    known = dict(flat(grid.shared))
    names = [name for name in RECIPE if known.get(name)]
    names += [name for name in known if name.split(".")[0] in known and "." in name]
    seeds = f"seed{'s' * (len(grid.seeds) > 1)} {', '.join(map(str, grid.seeds))}"
    return without_paths(f"All cells share: {', '.join(f'{name}={plain(known[name])}' for name in names)}; {seeds}.")


def _limits(grid: Grid) -> str:
    """What the tables do not show."""
    found = ["digits of 8 x 8 pixels, a small width and a short training are not ImageNet"] * (grid.data == "digits")
    if len(grid.seeds) == 1:
        counts = {run.result["n"] for run in grid.runs if "n" in run.result}
        sample = f" ({counts.pop()} test images)" if len(counts) == 1 else ""
        found.append(f"one seed, so differences within the 95 % bounds may be chance{sample}")
    found += _of_other_images(grid)
    found += [f"{run.place} has {', '.join(run.origin['changes'])}" for run in grid.runs if run.origin.get("changes")]
    found.append("low similarity alone is no merit: the norm over heads lowers it by construction, as norm_only shows")
    return f"Limits: {'; '.join(found)}."


def _of_other_images(grid: Grid) -> list[str]:
    """A sentence for each run whose images are not those of the first with the same `IMAGES`: a root may hold any."""
    found, first_of = [], {}
    for run in grid.runs:
        if pictures := run.result.get("made_of", {}).get("pictures"):
            marks = [pictures[name][:2] for name in ("train", "val")]  # number and fingerprint
            first, first_marks = first_of.setdefault(str([run.settings.get(name) for name in IMAGES]), (run, marks))
            if marks != first_marks:
                (train, _), (val, _) = marks
                found.append(f"{run.place} is of other images ({train:,} and {val:,} to evaluate) than {first.place}")
    return found


def _comparison(runs: Sequence[Run]) -> Table:
    """Two runs beside each other: differing settings first, then the results."""
    names = differing([run.settings for run in runs])
    rows = [[name, *(_text(run.settings.get(name)) for run in runs)] for name in names]
    rows += [["command", *(run.origin.get("command", "not recorded") for run in runs)],
             ["state", *(run.state if run.finished else run.progress for run in runs)]]
    rows += [[name, *(_text(run.result.get(name)) for run in runs)] for name in RESULTS]
    rows += [[f"mean M, {stage}, trained", *(_text(mean_similarity(run, "final", stage)) for run in runs)]
             for stage in ("final", "softmax")]
    notes = [f"{letter}: {without_paths(str(run.path))}" for letter, run in zip("AB", runs)]
    notes += [] if names else ["All settings are the same."]
    rows = [[name, *map(without_paths, values)] for name, *values in rows if {*values} != {NONE}]
    return Table("Two runs compared", ["setting", *_labels(runs)], rows, notes)


def _labels(runs: Sequence[Run]) -> list[str]:
    """`A: self`, `B: reattention`."""
    return [f"{letter}{label and f': {without_paths(label)}'}"
            for letter, label in zip("AB", labels([run.settings for run in runs]))]


def _text(value: object) -> str:
    return NONE if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def as_text(part: Part) -> str:
    """For a terminal: without figures and what is seldom asked for."""
    if isinstance(part, str):
        return part.replace("## ", "\n")
    if isinstance(part, Chart) or part.title == "Size and speed":
        return ""
    return "\n".join(["", part.title, printed(part.headers, part.rows), *part.notes])


def as_markdown(part: Part) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Chart):
        return f"![{part.caption}](figures/{part.name}.png)\n\n{part.caption}"
    headers, *rows = ([word.replace("|", "\\|") for word in words] for words in (part.headers, *part.rows))
    notes = "\n".join(f"- {note}" for note in part.notes)
    return f"### {part.title}\n\n{printed(headers, rows, markdown=True)}\n\n{notes}".strip()


def as_html(part: Part) -> str:
    if isinstance(part, Chart):
        return _figure(part)
    if isinstance(part, Table):
        return _table(part)
    if part.startswith("## "):
        return f"<h2>{escape(part[3:])}</h2>"
    return re.sub("`([^`]+)`", r"<code>\1</code>", f"<p>{escape(part)}</p>")


def _table(table: Table) -> str:
    left = [not are_numbers(row[index] for row in table.rows) for index in range(len(table.headers))]

    def row(words: Sequence[str], tag: str) -> str:
        cells = []
        for header, word, is_left in zip(table.headers, words, left):
            names = ["left"] * is_left + ["open"] * (header == "status" != word) + ["long"] * (len(word) > 24)
            attribute = f' class="{" ".join(names)}"' if names else ""
            cells.append(f"<{tag}{attribute}>{escape(word)}</{tag}>")
        return f"<tr>{''.join(cells)}</tr>"

    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return (f'<h3>{escape(table.title)}</h3><div class="scroll"><table><thead>{row(table.headers, "th")}</thead>'
            f'<tbody>{"".join(row(words, "td") for words in table.rows)}</tbody></table></div>'
            f'<ul class="notes">{notes}</ul>')


def _figure(chart: Chart) -> str:
    """Panels side by side on a screen, one in a row on a phone."""
    wide, narrow = (f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
                    for svg in (chart.svg, chart.narrow_svg))
    caption = escape(chart.caption)
    return (f'<figure><picture><source media="screen and (max-width: 700px)" srcset="{narrow}">'
            f'<img src="{wide}" alt="{caption}"></picture><figcaption>{caption}</figcaption></figure>')
