"""Times that can be compared on a noisy machine: all contestants in turn, round after round, and medians."""

import statistics
import time
from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 200
MOST_QUEUED, QUEUED_S = 20, 0.2  # calls in a row on a GPU: so many, or so long if that is fewer

Name = TypeVar("Name", bound=Hashable)
Step = TypeVar("Step", bound=Callable[[], object])


class Call(NamedTuple):
    """Seconds of a call, and those of them in which the calling thread had a core: the difference is what it waited for
    other programs (or for other threads of its own that did). By a GPU's own clock there is none."""

    wall: float
    computed: float


def interleaved(steps: dict[Name, Callable[[], object]], device: str, seconds: float) -> dict[Name, list[Call]]:
    """A call of every step in every round, after one round to warm up. One that finds no memory beside the
    others is left out."""
    times: dict[Name, list[Call]] = {name: [] for name in steps}
    calls = dict.fromkeys(steps, 1)
    end = time.perf_counter() + seconds
    for turn in range(-1, MAX_ROUNDS):
        for name in list(times):
            try:
                taken = timed(steps[name], device, calls[name])
            except torch.OutOfMemoryError:
                del times[name]
                continue
            if turn < 0:
                calls[name] = min(MOST_QUEUED, max(1, int(QUEUED_S / taken.wall)))
            else:
                times[name].append(taken)
        if turn + 1 >= MIN_ROUNDS and time.perf_counter() > end:
            break
    return times


def timed(step: Callable[[], object], device: str, calls: int = 1) -> Call:
    """One call. On a GPU: of one among `calls` queued in a row behind another, by the GPU's own clock; so
    launches overlap with work as they do in training, and what the last contestant did to the caches is over."""
    if device != "cuda":
        begin = time.perf_counter(), time.thread_time()
        step()
        return Call(time.perf_counter() - begin[0], time.thread_time() - begin[1])
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step()
    begin.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    seconds = begin.elapsed_time(end) / 1e3 / calls
    return Call(seconds, seconds)


def fitting(make: Callable[[int], Step], batch: int) -> tuple[Step, int]:
    """`make(batch)`, called once, and the batch: halved for as long as the GPU's memory does not suffice."""
    while True:
        step = None  # frees what a failed one holds
        try:
            step = make(batch)
            step()
            return step, batch
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        torch.cuda.empty_cache()
        batch //= 2


def reason(error: Exception) -> str:
    """Why a contestant has no figures, in a line."""
    text = str(error).strip().splitlines() or [""]
    return "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {text[0]}"[:200]


def left_out(steps: dict[str, object], times: dict[str, list[float]]) -> list[dict]:
    """Rows of those whose times `interleaved` left out."""
    return [{"name": name, "failed": "out of memory beside the others"} for name in steps if name not in times]


def summary(taken: list[Call], base: list[Call] | None = None, size: float = 1.0) -> dict:
    """`ms` (median), `spread` (quartiles, ms) and what `paired` says of `taken` against `base`, if there is one.

    Args:
        size: of a call's batch, as a part of the batch of `base`.
    """
    low, middle, high = statistics.quantiles([call.wall for call in taken], n=4)
    return {"ms": 1e3 * middle, "spread": (1e3 * low, 1e3 * high), **(paired(taken, base, size) if base else {})}


def paired(taken: list[Call], base: list[Call], size: float = 1.0) -> dict:
    """`ratio` of two contestants' times (median over the rounds), its quartiles `pairs`, and by what part the two took
    longer than they computed, `waited`."""
    low, middle, high = statistics.quantiles([a.wall / b.wall / size for a, b in zip(taken, base, strict=True)], n=4)
    wall, computed = map(sum, zip(*taken, *base))
    return {"ratio": middle, "pairs": (low, high), "waited": max(0.0, wall / computed - 1)}
