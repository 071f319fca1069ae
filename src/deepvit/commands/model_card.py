"""The markdown beside an exported model: what it is, how it was made and how well it does, by the run's files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepvit.engine.folder import RunFolder, read_json_lines
from deepvit.models import ViT

LINES = 12  # of a curve in the card; the whole one is in the run's metrics.jsonl
RECIPE = ("data", "augment", "optimizer", "schedule", "precision", "ema", "init", "head", "seed")


def write_card(path: Path, model: ViT, exported: Path, form: str, parity: str, run: Path | None, weights: str) -> None:
    """`parity`: how the exported file was compared with the model; `run`: the run's folder, None for a weights file
    alone; `weights`: "EMA" or "Raw"."""
    report = model.load_report
    result = RunFolder(run).read_result() if run else {}
    measured = report.said.get("metrics")  # a best checkpoint's own evaluation
    if isinstance(measured, Mapping) and "top1" in measured:
        shown, whose = {"data": result.get("data", "its data"), **measured}, f"`{report.path.name}`"
    else:
        shown, whose = result, "the run's last checkpoint"
    config = report.said.get("run") or (RunFolder(run).read_config() if run else {})
    parts = [f"# {exported.name}", f"Form: {form}. {parity}.", f"{weights} weights of `{report.path}`.",
             *(f"Note: {note}." for note in report.notes),
             "## Model", _table({"parameters": f"{sum(p.numel() for p in model.parameters()):,}", **model.config}),
             "## Recipe", _recipe(config), "## Evaluation", _evaluation(shown, whose), "## Curve", _curve(run),
             "## Made with", _origin(config, result), "## Classes", _classes(model)]
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8", errors="backslashreplace")


def is_card(path: Path, exported: str) -> bool:
    """Whether this module wrote it, for a file of that name."""
    begin = f"# {exported}\n\nForm: ".encode(errors="backslashreplace")
    return path.is_file() and path.read_bytes().startswith(begin)


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {key} | {_plain(value)} |" for key, value in rows.items() if value is not None]
    return "\n".join(["| setting | value |", "|---|---|", *lines])


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items() if inner is not None)
    return str(value).replace("|", "\\|")


def _recipe(config: Mapping[str, Any]) -> str:
    rows = {key: config[key] for key in RECIPE if config.get(key) is not None}
    return _table(rows) if rows else "Not known: the weights did not come from a run of this framework."


def _evaluation(result: Mapping[str, Any], whose: str) -> str:
    if "top1" not in result:
        return "Not known here: evaluate with `python eval.py checkpoint=...`."
    interval = f"{result['top1_low']:.2f} to {result['top1_high']:.2f}" if "top1_low" in result else ""
    return (f"Of {whose}, on the validation part of `{result.get('data', 'its data')}`.\n\n"
            "| top-1 % | 95 % interval | top-5 % | loss | pictures |\n|---|---|---|---|---|\n"
            f"| {result['top1']:.2f} | {interval} | {result['top5']:.2f} | {result['loss']:.4f} | {result['n']:,} |"
            + (f"\n\nBest top-1 of the run: {result['best_top1']:.2f} % at step {result['best_step']:,}."
               if "best_top1" in result else ""))


def _curve(run: Path | None) -> str:
    """Evaluations along the training, at most `LINES` of them, first and last included."""
    if not run or not (run / "metrics.jsonl").exists():
        return "Not known."
    evaluations = [line for line in read_json_lines(run / "metrics.jsonl")
                   if {"step", "epoch", "top1", "loss"} <= line.keys()]
    if not evaluations:
        return "The run has not been evaluated."
    last = len(evaluations) - 1
    picked = sorted({round(i * last / max(1, LINES - 1)) for i in range(LINES)})
    rows = [f"| {line['step']:,} | {line['epoch']:.1f} | {line['top1']:.2f} | {line['loss']:.4f} |"
            for line in (evaluations[i] for i in picked)]
    return "\n".join(["| step | epoch | top-1 % | loss |", "|---|---|---|---|", *rows])


def _origin(config: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if not result:
        return "Not known."
    return _table({"command": (config.get("origin") or {}).get("command"), "git revision": result.get("git"),
                   **(result.get("versions") or {}), "device": result.get("device"), "devices": result.get("devices")})


def _classes(model: ViT) -> str:
    said = model.load_report.said
    names = said.get("class_names") or said.get("classes") or []
    shown = ", ".join(map(str, names[:20])) + (", ..." if len(names) > 20 else "")
    return f"{model.num_classes} classes" + (f": {shown}" if shown else "") + "."

