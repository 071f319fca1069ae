"""`hydra/launcher=parallel`. Hydra imports this at every start, so what it takes is imported when a sweep begins."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher


class ParallelLauncher(Launcher):
    """Runs the cells of a sweep of deepvit side by side, each on devices of its own."""

    def __init__(self, cells_per_device: int):
        self.cells_per_device = cells_per_device

    def setup(self, **given: Any) -> None:
        self.given = given  # hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        from deepvit.commands.parallel import run_side_by_side
        return run_side_by_side(job_overrides, initial_job_idx, self.cells_per_device, **self.given)
