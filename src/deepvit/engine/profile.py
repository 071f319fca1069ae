"""Where a step goes: torch's trace of some steps, and a table of it."""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile, schedule

PARTS = ("wait for data", "prepare", "forward", "backward", "exchange", "optimizer")  # as the loop records them
SKIPPED = 5  # steps before the first that is recorded: by then everything is compiled and allocated
ROWS = 12  # of operators
log = logging.getLogger(__name__)


class StepProfile(profile):
    """Records `steps` steps soon after number `first`, if `left` suffice; logs a table, writes it and the trace."""

    def __init__(self, folder: Path, device: torch.device, steps: int, first: int, left: int):
        self._folder, self._on_gpu, self._steps = folder, device.type == "cuda", max(1, min(steps, left - 1))
        skipped = max(1, min(SKIPPED, left - self._steps))
        self._first, self._written = first + skipped, False
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu
        super().__init__(activities=activities, on_trace_ready=self._write,
                         schedule=schedule(wait=skipped - 1, warmup=1, active=self._steps, repeat=1))

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if not self._written:
            log.warning("engine.profile: the run ended before %d steps were recorded.", self._steps)

    def _write(self, recorded: profile) -> None:
        self._written = True
        table = "\n".join(_table(recorded.key_averages(), self._on_gpu))
        name = self._folder / f"steps-{self._first + 1}-{self._first + self._steps}"
        log.info("%s", table)
        try:
            self._folder.mkdir(exist_ok=True)
            name.with_suffix(".txt").write_text(table + "\n")
            recorded.export_chrome_trace(f"{name}.json.gz")
        except OSError as error:
            log.warning("The profile cannot be written to %s (%s).", self._folder, error.strerror)
        else:
            log.info("The trace, for ui.perfetto.dev: %s.json.gz", name)


def _table(averages: EventList, on_gpu: bool) -> Iterator[str]:
    """Time on the host by part of a step, then the operators that keep the device busy longest by themselves."""
    step = next(event for event in averages if event.key.startswith("ProfilerStep"))
    parts = {event.key: event.cpu_time_total for event in averages if event.key in PARTS}  # microseconds
    times = {**dict.fromkeys(PARTS, 0), **parts, "the rest": step.cpu_time_total - sum(parts.values())}
    yield f"{'on the host':40} {'ms a step':>10} {'share':>7}"
    for name, time in times.items():
        yield f"{name:40} {time / step.count / 1000:10.2f} {time / step.cpu_time_total:7.1%}"
    title = f"mean of {step.count} steps"
    yield f"{title:40} {step.cpu_time_total / step.count / 1000:10.2f}\n"

    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in averages if event.key not in PARTS and not event.key.startswith("ProfilerStep")]
    total = sum(getattr(event, own) for event in events) or 1
    title = f"on the {'GPU' if on_gpu else 'CPU'}, the longest by themselves"
    yield f"{title:40} {'ms a step':>10} {'share':>7} {'calls':>7}"
    for event in sorted(events, key=lambda event: -getattr(event, own))[:ROWS]:
        time, calls = getattr(event, own), event.count / step.count
        yield f"{event.key[:40]:40} {time / step.count / 1000:10.2f} {time / total:7.1%} {calls:7.1f}"
