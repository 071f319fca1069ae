"""Times that can be compared on a noisy machine: all contestants in turn, round after round, and medians."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import NamedTuple, TypeVar

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 200
MOST_QUEUED, QUEUED_S = 20, 0.2  # calls in a row on a GPU: this many, or for this long if fewer
COPY_AND_PRODUCT = {"cuda": (2**31, 8192), "cpu": (2**27, 1024)}  # bytes of the copy, side of the product
CALLS = 10

Name = TypeVar("Name", bound=Hashable)
Step = TypeVar("Step", bound=Callable[[], object])
Value = TypeVar("Value")


class Call(NamedTuple):
    """Seconds of a call by the wall clock, and those in which the calling thread had a core: the difference is time
    spent waiting, for other programs or its own threads. A GPU's clock gives both the same."""

    wall: float
    computed: float


def interleaved(steps: dict[Name, Callable[[], object]], device: str, seconds: float) -> dict[Name, list[Call]]:
    """A call of every step in every round, after a warm-up round. A step that runs out of memory is left out."""
    times: dict[Name, list[Call]] = {name: [] for name in steps}
    calls = dict.fromkeys(steps, 1)
    end = time.perf_counter() + seconds
    for turn in range(MAX_ROUNDS + 1):
        for name in list(times):
            try:
                times[name].append(timed(steps[name], device, calls[name]))
            except torch.OutOfMemoryError:
                del times[name]
                continue
            if turn == 0:
                calls[name] = min(MOST_QUEUED, max(1, int(QUEUED_S / times[name].pop().wall)))
        if turn >= MIN_ROUNDS and time.perf_counter() > end:
            break
    return times


def timed(step: Callable[[], object], device: str, calls: int = 1) -> Call:
    """One call; on a GPU the mean of `calls` queued behind another, by its own clock: launches overlap with work."""
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


def fitting(make: Callable[[int], Step], batch: int) -> Step:
    """`make(batch)`, called once; the batch is halved until it fits into the GPU's memory."""
    while True:
        step = None  # frees what a failed one holds
        try:
            step = make(batch)
            step()
            return step
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        torch.cuda.empty_cache()
        batch //= 2


def apart(function: Callable[..., Value], *arguments: object, start: str = "forkserver") -> Value:
    """`function(*arguments)` in a fresh process, by default forked from one that has only imported the bench."""
    context = multiprocessing.get_context(start)
    context.set_forkserver_preload(["deepvit.bench.training"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def left_out(steps: dict[str, object], times: dict[str, list[Call]]) -> list[dict]:
    """Rows of the steps that `interleaved` left out."""
    return [{"name": name, "failed": "out of memory beside the others"} for name in steps if name not in times]


def summary(taken: list[Call], base: list[Call] | None = None, size: float = 1.0) -> dict:
    """`ms` (median), `spread` (quartiles, ms) and, with a `base`, what `paired` says."""
    low, middle, high = statistics.quantiles([call.wall for call in taken], n=4)
    return {"ms": 1e3 * middle, "spread": (1e3 * low, 1e3 * high), **(paired(taken, base, size) if base else {})}


def paired(taken: list[Call], base: list[Call], size: float = 1.0) -> dict:
    """`ratio` to `base` (median over the rounds, for the same batch: `size` is taken's over base's), its quartiles
    `pairs`, and `waited`, the wall time of both over their computing time, less 1."""
    low, middle, high = statistics.quantiles([a.wall / b.wall / size for a, b in zip(taken, base, strict=True)], n=4)
    wall, computed = map(sum, zip(*taken, *base))
    return {"ratio": middle, "pairs": (low, high), "waited": max(0.0, wall / computed - 1)}


class Ceilings(NamedTuple):
    """The rates that a device reaches at best."""

    bytes_per_s: float  # read plus written
    flops_per_s: float  # of matrix products: bfloat16 on a GPU, float32 on a CPU

    def floor_ms(self, flops: float, moved: float) -> float:
        """The larger of the times for `flops` operations and for `moved` bytes."""
        return 1e3 * max(flops / self.flops_per_s, moved / self.bytes_per_s)


def ceilings(device: str) -> Ceilings:
    """By a large copy and a large product on the threads in use, of random numbers (a product of zeros is faster)."""
    return _ceilings(device, torch.get_num_threads())


@cache
def _ceilings(device: str, threads: int) -> Ceilings:
    nbytes, side = COPY_AND_PRODUCT[device]
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    copy = min(timed(lambda: target.copy_(source), device, CALLS).wall for _ in range(3))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = min(timed(lambda: left @ right, device, CALLS).wall for _ in range(3))
    return Ceilings(2 * nbytes / copy, 2 * side**3 / product)


def ceiling_rows(device: str = "cpu") -> list[dict]:
    """Rows with `case`, `name` (which says the unit) and `reached`."""
    best = ceilings(device)
    kind = "bfloat16" if device == "cuda" else "float32"
    return [{"case": "ceilings", "name": "copy, GB/s read and written", "reached": best.bytes_per_s / 1e9},
            {"case": "ceilings", "name": f"{kind} product, TFLOP/s", "reached": best.flops_per_s / 1e12}]
