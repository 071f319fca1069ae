"""Where the ranks of a run come from: this process, torch's elastic launcher, or torchrun."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepvit.errors import Failure, UserError

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75  # exit codes
STOP_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a job ended, in a form that crosses processes: an exit code, a sentence if it went wrong, what it found."""

    code: int = DONE
    message: str = ""
    value: Any = None


Job = Callable[[Mapping[str, Any], Path, Any, Any], Outcome]  # (config, folder, ranks, stop request)


def launch(job: Job, config: Mapping[str, Any], folder: Path) -> Outcome:
    """Runs `job` on as many ranks as `config["engine"]` asks for (null: every visible GPU; one process on a CPU).

    Args:
        job: a module-level function; it is imported anew in each rank.
        config: plain values.
    Returns:
        rank 0's outcome. Ranks that die are started again together, `engine.max_restarts` times.
    """
    if "RANK" in os.environ:  # torchrun started us: we are one rank, and it watches over the others
        return run_rank(job, dict(config), str(folder))
    try:
        devices = _devices(config["engine"])
    except UserError as error:
        return Outcome(BAD_INPUT, str(error))
    if devices == 1:
        return run_rank(job, dict(config), str(folder))
    return _launch_elastic(job, config, folder, devices)


def run_rank(job: Job, config: dict[str, Any], folder: str) -> Outcome:
    """One rank, from joining the others to its outcome. What the user did wrong is returned, never raised: the
    launcher would start such a job again."""
    from deepvit.engine.ranks import join
    from deepvit.engine.signals import stop_requests
    engine = config["engine"]
    set_up_logging(int(os.environ.get("RANK", 0)))
    try:
        with stop_requests() as stop, join(engine["accelerator"], engine["timeout_s"]) as ranks:
            return job(config, Path(folder), ranks, stop)
    except UserError as error:
        return Outcome(BAD_INPUT, str(error))
    except Failure as error:
        if "RANK" in os.environ and "lost another rank" in str(error):
            raise  # so that the launcher starts all ranks again
        return Outcome(FAILED, str(error))


def _launch_elastic(job: Job, config: Mapping[str, Any], folder: Path, devices: int) -> Outcome:
    from torch.distributed.elastic.agent.server.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    engine = config["engine"]
    setup = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=devices, run_id=f"deepvit-{os.getpid()}", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=engine["max_restarts"], start_method="spawn", monitor_interval=0.1,
        signals_to_handle=STOP_SIGNALS)
    handlers = {number: signal.getsignal(number) for number in
                (getattr(signal, name) for name in STOP_SIGNALS.split(","))}
    try:
        outcomes = elastic_launch(setup, run_rank)(job, dict(config), str(folder))
        return outcomes[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return Outcome(FAILED, f"Rank {rank} died (exit code {failure.exitcode}) and {engine['max_restarts']} restarts "
                               f"did not help; its last words are above and in {folder}/train.log.")
    except SignalException as error:
        return Outcome(STOPPED, f"Stopped on request ({error.sigval.name}).")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _devices(engine: Mapping[str, Any]) -> int:
    import torch
    wanted, accelerator = engine["devices"], engine["accelerator"]
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return wanted or 1
    present = torch.cuda.device_count()
    if not present:
        raise UserError("engine.accelerator=cuda, but torch sees no CUDA device here: use engine.accelerator=auto, "
                        "or check the driver and CUDA_VISIBLE_DEVICES.")
    if (wanted or present) > present:
        raise UserError(f"engine.devices={wanted}, but {present} CUDA devices are visible.")
    return wanted or present


def set_up_logging(rank: int = 0) -> None:
    """Lines to standard output from rank 0; from the others only what is wrong, with their number."""
    logger = logging.getLogger("deepvit")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    console.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logger.addHandler(console)
    logger.setLevel(logging.DEBUG if rank == 0 else logging.INFO)
    logger.propagate = False


def unexpected(error: BaseException) -> Outcome:
    """A defect of ours: its traceback is printed, the code is that of a failure."""
    traceback.print_exception(error)
    return Outcome(FAILED, f"{type(error).__name__}: {error}")
