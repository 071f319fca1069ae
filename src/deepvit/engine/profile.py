"""Where a step goes: torch's trace of some steps, and a table of it."""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED = 5  # steps before the first that is recorded: by then everything is compiled and allocated
ROWS = 30  # of the table: parts of a step, as the loop records them, and operators
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
        table = recorded.key_averages().table(sort_by="cuda_time_total" if self._on_gpu else "cpu_time_total",
                                              row_limit=ROWS, max_name_column_width=40)
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
