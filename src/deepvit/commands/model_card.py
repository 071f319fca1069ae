"""The markdown beside an exported model: what it is, how it was made and how well it does, by the run's files."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepvit.analysis.images import evaluated_as
from deepvit.config.compare import flat, has_no_effect
from deepvit.config.records import read_json_lines
from deepvit.engine.folder import RunFolder
from deepvit.models import ViT
from deepvit.report.render import printed

FRONT = """---
library_name: timm
pipeline_tag: image-classification
license: unknown
tags: [image-classification, vision-transformer, timm, deepvit]
---"""
ABSOLUTE = re.compile(r"(?<![\w/.])(?:/[^\s/|`'\",]+)+/(?=[^\s/|`'\",])")  # all of a path but its last name
LINES = 12  # of a curve in the card; the whole one is in the run's metrics.jsonl
RECIPE = ("data", "augment", "optimizer", "schedule", "precision", "ema", "init", "head", "seed")


def write_card(path: Path, model: ViT, exported: Path, form: str, parity: str, snippet: str, run: Path | None) -> None:
    """With front matter as the Hugging Face hub reads it, and no absolute path of this machine. `parity`: how the file
    was compared with the model; `snippet`: Python that loads it; `run`: the run's folder, if there is one."""
    report = model.load_report
    result = RunFolder(run).read_result() if run else {}
    config = report.said.get("run") or (RunFolder(run).read_config() if run else {})
    made = {"command": (config.get("origin") or {}).get("command"), "git revision": result.get("git"),
            **(result.get("versions") or {}), "device": result.get("device"), "devices": result.get("devices")}
    classes = report.said.get("class_names") or report.said.get("classes") or []
    names = f": {', '.join(map(str, classes[:20]))}{', ...' if len(classes) > 20 else ''}" if classes else ""
    parts = [FRONT, f"# {exported.name}", f"```python\n{snippet}\n```", f"Form: {form}. {parity}.", _images(model),
             f"{'EMA' if report.weights == 'ema' else 'Raw'} weights of `{report.path.name}`.",
             *(f"Note: {note}." for note in (*report.notes, *report.resized)),
             "## Model", _table({"parameters": f"{sum(p.numel() for p in model.parameters()):,}", **model.config}),
             "## Recipe", _recipe(config), "## Evaluation",
             _evaluation(model, result, config), "## Curve", _curve(run),
             "## Made with", _table(made) if result else "Not known.",
             "## Classes", f"{model.num_classes} classes{names}."]
    text = ABSOLUTE.sub(".../", "\n\n".join(parts))
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def is_card(path: Path, exported: str) -> bool:
    """Whether this module wrote it, for a file of that name."""
    begin = f"{FRONT}\n\n# {exported}\n\n```python".encode(errors="backslashreplace")
    return path.is_file() and path.read_bytes().startswith(begin)


def _images(model: ViT) -> str:
    """What it takes, in numbers: most forms do not hold it."""
    (height, width), how = model.img_size, evaluated_as(model)
    channels = model.config["in_chans"]
    colours = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    numbers = f"mean {how['mean']} over std {how['std']}"
    crop_pct = how["crop_pct"] or model.pretrained_cfg["crop_pct"]
    return (f"Takes images of {height} x {width} pixels: the shorter side resized to size / {crop_pct:g} "
            f"({how['interpolation']}), the centre cut out, {colours} from 0 to 1 less {numbers}.")


def _table(rows: Mapping[str, Any]) -> str:
    return printed(["setting", "value"], [[key, _plain(value)] for key, value in rows.items() if value is not None],
                   markdown=True)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items() if inner is not None)
    return str(value).replace("|", "\\|")


def _recipe(config: Mapping[str, Any]) -> str:
    settings = flat({key: config.get(key) for key in RECIPE})
    rows = {name: value for name, value in settings if value and not has_no_effect(name)}
    return f"{_table(rows)}\n\nWhat is off is left out." if rows else "Not known: the weights are not of a run of ours."


def _evaluation(model: ViT, result: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """A best checkpoint's own evaluation if it holds one, else the run's result; none of other weights or models."""
    said, whose = model.load_report.said, "the run's last checkpoint"
    measured, steps = said.get("metrics"), result.get("steps")
    if isinstance(measured, Mapping) and "top1" in measured:
        result, whose = {"data": result.get("data", "its data"), **measured}, f"`{model.load_report.path.name}`"
    elif said.get("step", steps) != steps:  # weights that were kept on the way
        result = {}
    if "top1" not in result or not _is_as_measured(model, config):
        return "Not known here: evaluate with `python eval.py checkpoint=...`."
    top5 = f"{result['top5']:.2f}" if "top5" in result else ""
    interval = f"{result['top1_low']:.2f} to {result['top1_high']:.2f}" if "top1_low" in result else ""
    row = [f"{result['top1']:.2f}", interval, top5, f"{result['loss']:.4f}", f"{result['n']:,}"]
    table = printed(["top-1 %", "95 % interval", "top-5 %", "loss", "images"], [row], markdown=True)
    best = (f"\n\nBest top-1 of the run: {result['best_top1']:.2f} % at step {result['best_step']:,}."
            if "best_top1" in result else "")
    return f"Of {whose}, on the validation part of `{result.get('data', 'its data')}`.\n\n{table}{best}"


def _is_as_measured(model: ViT, config: Mapping[str, Any]) -> bool:
    """Whether its run measured these weights (its moving average if it has one) with this head and these settings."""
    report, is_averaged = model.load_report, (config.get("ema") or {}).get("decay")
    own = {name: value for name, value in flat(report.said.get("config") or {})
           if name not in ("attention.sync_norm", "num_classes")}
    return (own.items() <= dict(flat(model.config)).items() and report.head is model.head
            and "averaged" not in report.said and not (report.weights == "raw" and is_averaged))


def _curve(run: Path | None) -> str:
    """Evaluations along the training, at most `LINES` of them, first and last included."""
    lines = read_json_lines(run / "metrics.jsonl") if run else []
    found = [line for line in lines if {"step", "epoch", "top1", "loss"} <= line.keys()]
    if not found:
        return "Not known."
    picked = sorted({round(i * (len(found) - 1) / (LINES - 1)) for i in range(LINES)})
    rows = [[f"{line['step']:,}", f"{line['epoch']:.1f}", f"{line['top1']:.2f}", f"{line['loss']:.4f}"]
            for line in (found[i] for i in picked)]
    return printed(["step", "epoch", "top-1 %", "loss"], rows, markdown=True)
