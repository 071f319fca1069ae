"""Times that can be compared on a noisy machine: all contestants in turn, round after round, and medians."""

import statistics
import time
from collections.abc import Callable

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 200


def interleaved(steps: dict[str, Callable[[], None]], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of every step in every round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    for turn in range(MAX_ROUNDS + 1):
        for name, step in steps.items():
            begin = now(device)
            step()
            taken = now(device) - begin
            if turn:
                times[name].append(taken)
        if turn >= MIN_ROUNDS and time.perf_counter() > end:
            break
    return times


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def summary(taken: list[float], base: list[float]) -> dict:
    """`ms` (median), `spread` (quartiles, ms), `ratio` to `base` (median of the ratios within a round)."""
    low, middle, high = statistics.quantiles(taken, n=4)
    return {"ms": 1e3 * middle, "spread": (1e3 * low, 1e3 * high),
            "ratio": statistics.median(a / b for a, b in zip(taken, base, strict=True))}
