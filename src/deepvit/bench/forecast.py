"""What `dry=true` says of a run, beside what such runs take: each in a process of its own, the forecast first."""

import statistics
from collections.abc import Iterator

from deepvit.bench.apart import apart
from deepvit.bench.training import alone, trained
from deepvit.config.compose import compose
from deepvit.engine.device import peak_bytes, reset_peak
from deepvit.engine.signals import StopRequest
from deepvit.run.forecast import forecast

RUNS, STEPS = 3, 4  # of the steps the first is left out
FEW_IMAGES = ["data=digits", "data.classes=2", "data.eval_batch_size=64", "calibrate=0", "probe.images=4"]


def measure(device: str = "cpu", *, depth: int | None = None, batch: int | None = None) -> Iterator[dict]:
    """Rows with `case`, `name`, `forecast`, `taken` (median of the runs), `spread` (their ends) and `ratio`, for the
    peak memory of the training process (over what it had before the model) and for the time of a step.

    Args:
        depth: default 16 and 32 blocks; batch: default 32, on a GPU 256; of the digits, enlarged to 224 pixels.
    """
    batch = batch or (256 if device == "cuda" else 32)
    for blocks in [depth] if depth else (16, 32):
        config = compose(["recipe=imagenet", *FEW_IMAGES, "model=deepvit32", f"model.depth={blocks}",
                          f"data.batch_size={batch}", "data.workers=1", "engine.log_every=1", "schedule.epochs=null",
                          "schedule.warmup_epochs=null", f"schedule.steps={STEPS}", "schedule.warmup_steps=0",
                          "schedule.cooldown_epochs=0"])
        said = apart(_forecast, config, device)
        found = [apart(_run, config, device) for _ in range(RUNS)]
        for name, number, takes in zip(("peak memory, MiB", "a step, s"), said, zip(*found, strict=True), strict=True):
            middle = statistics.median(takes)
            yield {"case": f"forecast, {blocks} blocks, 224 px, batch {batch}", "name": name, "forecast": number,
                   "taken": middle, "spread": (min(takes), max(takes)), "ratio": number / middle}


def _forecast(config: dict, device: str) -> tuple[float, float]:
    found = forecast(config, alone(device), StopRequest())
    return found["memory_mib"], found["step_s"]


def _run(config: dict, device: str) -> tuple[float, float]:
    """MiB, and seconds a step (median)."""
    ranks = alone(device)
    before = reset_peak(ranks.device)
    lines = [line for line in trained(config, ranks) if "lr" in line]
    seconds = statistics.median(config["data"]["batch_size"] / line["images_per_s"] for line in lines[1:])
    return (peak_bytes(ranks.device) - before) / 2**20, seconds
