"""Two runs beside each other: which settings differ, what came out, both curves."""

from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes

from deepvit.config.compare import labels
from deepvit.report.curves import CURVES, draw_curve
from deepvit.report.chart import COLOURS, Chart, legend
from deepvit.report.runs import Run, without_paths
from deepvit.report.tables import NONE, Table, mean_similarity

RESULTS = ("top1", "top5", "loss", "best_top1", "n", "params", "flops", "steps", "epochs", "images_per_s", "git")


def comparison(runs: Sequence[Run]) -> Table:
    """Differing settings first, then the results."""
    first, second = (run.settings for run in runs)
    names = [name for name in dict.fromkeys([*first, *second]) if first.get(name) != second.get(name)]
    rows = [[name, _text(first.get(name)), _text(second.get(name))] for name in names]
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


def comparison_chart(runs: Sequence[Run]) -> Chart:
    first, second = _labels(runs)
    return Chart("compare", f"{first} (solid) and {second} (dashed).",
                   [partial(_curves, runs=runs, name=name) for name in CURVES])


def _curves(axes: Axes, runs: Sequence[Run], name: str) -> None:
    for label, run, colour, style in zip(_labels(runs), runs, COLOURS, ("-", "--")):
        draw_curve(axes, run, name, color=colour, linestyle=style, label=label)
    axes.set(xlabel="epoch", ylabel=CURVES[name])
    legend(axes)
