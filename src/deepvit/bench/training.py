"""Whole training runs: a small model's images a second, and the forecast of `dry=true` against real runs."""

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from deepvit.bench.models import OURS
from deepvit.bench.timing import apart
from deepvit.config.compose import compose
from deepvit.config.records import read_json_lines
from deepvit.engine.device import peak_bytes, reset_peak
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.errors import UserError, reason
from deepvit.run.measures import forecast
from deepvit.run.train import train

LOGGED = 8  # lines of the small model's log, of which the first two warm up
RUNS, STEPS = 3, 4  # of a forecast run, whose first step is left out
STEPS_ALONE = ["schedule.epochs=null", "schedule.warmup_epochs=null", "schedule.warmup_steps=0"]
FEW_IMAGES = ["data=digits", "data.classes=2", "data.eval_batch_size=64", "calibrate=0", "probe.images=4"]


def small_model(device: str = "cpu", *, depth: int = 32, batch: int | None = None, cifar10: str | None = None,
                compiled: bool = False) -> Iterator[dict]:
    """Rows with `case`, `name`, `images_per_s` and `data_wait` (both medians over the log) and `top1`; or `failed`.
    batch: default 512, on a CPU 32. cifar10: its folder; without it the built-in digits, enlarged. compiled: by
    torch.compile, on a GPU in its default mode and as CUDA graphs. Not compiled, on a GPU with deterministic algorithms
    too, each form in a fresh process."""
    batch = batch or (512 if device == "cuda" else 32)
    case = f"training on {'CIFAR-10' if cifar10 else 'digits'}, {depth} blocks of width 192, 65 tokens, batch {batch}"
    data = [f"data.root={cifar10}"] if cifar10 else ["data=digits"]
    every = 20 if device == "cuda" else 1
    settings = ["recipe=cifar10", *data, "model=deepvit32", f"model.depth={depth}", "model.embed_dim=192",
                "model.num_heads=6", "precision=bf16", "data.on_device=true", f"data.batch_size={batch}",
                f"engine.log_every={every}", "probe.images=0", *STEPS_ALONE, f"schedule.steps={LOGGED * every}"]
    forms = ("engine.compile=default", "engine.compile=reduce-overhead") if compiled else (
        "", "engine.deterministic=true")
    for form in forms if device == "cuda" else forms[:1]:
        name = f"{OURS}, deterministic" if "deterministic" in form else OURS  # no target is for the former
        row = {"name": name, "case": f"{case}, {form}" if form else case}
        config = compose([*settings, form] if form else settings)
        try:
            lines = apart(_log_of, config, device) if device == "cuda" else _log_of(config, device)
        except UserError:
            raise
        except Exception as error:  # one form's failure is a row, and the other goes on
            yield row | {"failed": reason(error)}
            continue
        steady = [line for line in lines if "lr" in line][2:]
        medians = {field: statistics.median(line[field] for line in steady) for field in ("images_per_s", "data_wait")}
        yield row | medians | {"top1": next(line["top1"] for line in reversed(lines) if "top1" in line)}


def forecasts(device: str = "cpu", *, depth: int | None = None, batch: int | None = None) -> Iterator[dict]:
    """Rows with `case`, `name`, `forecast`, `taken` (median of the runs), `spread` (their ends) and `ratio`, for the
    peak memory of the training process (over what it had before the model) and for the time of a step; each run, and
    first the forecast, in a fresh process. depth: default 16 and 32; batch: default 32, on a GPU 256."""
    batch = batch or (256 if device == "cuda" else 32)
    for blocks in [depth] if depth else (16, 32):
        config = compose(["recipe=imagenet", *FEW_IMAGES, "model=deepvit32", f"model.depth={blocks}",
                          f"data.batch_size={batch}", "data.workers=1", "engine.log_every=1", *STEPS_ALONE,
                          f"schedule.steps={STEPS}", "schedule.cooldown_epochs=0"])
        said = apart(_forecast, config, device)
        found = [apart(_run, config, device) for _ in range(RUNS)]
        for name, number, takes in zip(("peak memory, MiB", "a step, s"), said, zip(*found, strict=True), strict=True):
            middle = statistics.median(takes)
            yield {"case": f"forecast, {blocks} blocks, 224 px, batch {batch}", "name": name, "forecast": number,
                   "taken": middle, "spread": (min(takes), max(takes)), "ratio": number / middle}


def _forecast(config: dict, device: str) -> tuple[float, float]:
    found = forecast(config, _one_rank(device), StopRequest())
    return found["memory_mib"], found["step_s"]


def _run(config: dict, device: str) -> tuple[float, float]:
    """MiB, and seconds a step (median)."""
    before = reset_peak(torch.device(device))
    lines = [line for line in _log_of(config, device) if "lr" in line]
    seconds = statistics.median(config["data"]["batch_size"] / line["images_per_s"] for line in lines[1:])
    return (peak_bytes(torch.device(device)) - before) / 2**20, seconds


def _one_rank(device: str) -> Ranks:
    return Ranks(0, 1, torch.device(device, 0 if device == "cuda" else None))


def _log_of(config: Mapping[str, Any], device: str) -> list[dict[str, Any]]:
    """What a run of `config` logs."""
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder), _one_rank(device), StopRequest())
        return read_json_lines(Path(folder) / "metrics.jsonl")
