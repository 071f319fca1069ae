"""Where the ranks of a run come from (this process, torch's elastic launcher, torchrun), and what they do."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepvit.config.paths import refuse_missing
from deepvit.config.settings import read_group
from deepvit.engine.signals import handled_signals
from deepvit.errors import BAD_INPUT, DONE, FAILED, STOPPED, Failure, UserError
from deepvit.run.console import set_up_logging
from deepvit.run.slurm import take_place

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what every rank is told
START_METHOD = "spawn"  # of the ranks: CUDA does not survive a fork

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a job ended, in a form that crosses processes: an exit code, a sentence if it went wrong, what it found, and
    whether starting all ranks again may help."""

    code: int = DONE
    message: str = ""
    value: Any = None
    retry: bool = False


Job = Callable[[Mapping[str, Any], Path, Any, Any], Outcome]  # (config, folder, ranks, stop request)


def launch(job: Job, config: Mapping[str, Any], folder: Path) -> Outcome:
    """Runs `job` on as many ranks as `config["engine"]` asks for (null: every visible GPU; one process on a CPU).

    Args:
        job: a module-level function; it is imported anew in each rank.
        config: plain values.
    Returns:
        rank 0's outcome. Ranks that die are started again together, `engine.max_restarts` times.
    """
    try:
        read_group("engine", config.get("engine"))
        refuse_missing(config, folder)
        if is_rank := joined():
            refuse_other_count(config["engine"])
        devices = 1 if is_rank else _devices(config["engine"])
    except UserError as error:
        return Outcome(BAD_INPUT, str(error))
    if devices > 1:
        return _launch_elastic(job, config, folder, devices)
    outcome = run_rank(job, dict(config), str(folder))
    # A request to stop ends well below torchrun, or it would start all ranks again; events.jsonl has PREEMPTED.
    return replace(outcome, code=DONE) if outcome.code == STOPPED and _below_torchrun() else outcome


def joined() -> bool:
    """Whether a launcher such as torchrun or srun started this process as one of several ranks.

    Raises:
        UserError: its variables are half set, or no numbers.
    """
    for name in (*LAUNCHED, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if os.environ.get(name) == "":
            del os.environ[name]  # set to nothing is not set, for whoever reads it
    take_place(os.environ)
    if "RANK" not in os.environ:
        return False
    advice = "start through torchrun, or `unset RANK` to train alone."
    missing = [name for name in LAUNCHED if name not in os.environ]
    if missing:
        raise UserError(f"RANK={os.environ['RANK']} is set, but {', '.join(missing)} not: {advice}")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        value, limit = os.environ.get(name, "0"), os.environ["WORLD_SIZE"] if name == "RANK" else "65536"
        if not value.isdecimal() or int(value) >= int(limit):
            raise UserError(f"{name}={value} is no number of a launcher (WORLD_SIZE={os.environ['WORLD_SIZE']}): "
                            f"{advice}")
    return True


def refuse_other_count(engine: Mapping[str, Any]) -> None:
    """UserError where `engine.devices` asks for another number of processes than a launcher started."""
    wanted, started = engine["devices"], os.environ["WORLD_SIZE"]
    if wanted is not None and str(wanted) not in (started, os.environ.get("LOCAL_WORLD_SIZE")):
        raise UserError(f"engine.devices={wanted} has no effect where torchrun started {started} processes: leave it "
                        f"out, or give torchrun --nproc-per-node={wanted}.")


def _below_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def run_rank(job: Job, config: dict[str, Any], folder: str) -> Outcome:
    """One rank, from joining the others to its outcome; what the user did wrong is returned, never raised."""
    from deepvit.engine.ranks import LostRank, join
    from deepvit.engine.signals import stop_requests
    engine = config["engine"]
    set_up_logging(int(os.environ.get("RANK", 0)))
    try:
        with stop_requests() as stop, join(engine["accelerator"], engine["timeout_s"]) as ranks:
            return job(config, Path(folder), ranks, stop)
    except UserError as error:
        return Outcome(BAD_INPUT, str(error))
    except Failure as error:
        return Outcome(FAILED, str(error), retry=isinstance(error, LostRank))


def run_child(job: Job, config: dict[str, Any], folder: str) -> Outcome:
    """A rank below the elastic launcher, which starts all ranks again if this one *exits* badly."""
    outcome = run_rank(job, config, folder)
    if outcome.retry:
        log.error("%s", outcome.message)
        sys.exit(outcome.code)
    if outcome.code == STOPPED:
        _leave_soon()
    return outcome


def _leave_soon() -> None:
    """A launcher that is asked to stop awaits the end of its ranks, and its ranks await its word: one must go first."""
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(DONE))
    signal.setitimer(signal.ITIMER_REAL, 1.0)  # second
    sys.stdout.flush()


def _launch_elastic(job: Job, config: Mapping[str, Any], folder: Path, devices: int) -> Outcome:
    from torch.distributed.elastic.agent.server.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    engine, signals = config["engine"], handled_signals()
    setup = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=devices, run_id=f"deepvit-{os.getpid()}", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=engine["max_restarts"], start_method=START_METHOD,
        monitor_interval=0.1, signals_to_handle=",".join(number.name for number in signals))
    for name in list(logging.root.manager.loggerDict):  # their tracebacks: our ranks say what happened
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing.spawn")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    handlers = {number: signal.getsignal(number) for number in signals}
    try:
        outcomes = elastic_launch(setup, run_child)(job, dict(config), str(folder))
        return outcomes[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return Outcome(FAILED, f"Rank {rank} {end_of(failure.exitcode)}, and {engine['max_restarts']} restarts did not "
                               f"help (engine.max_restarts); its last words are above and in {folder}/train.log. The "
                               f"same command continues from the last checkpoint.")
    except SignalException as error:
        return Outcome(STOPPED, f"Stopped on request ({error.sigval.name}).")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def end_of(exitcode: int) -> str:
    """How a process ended, in words."""
    return f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"died (exit code {exitcode})"


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


def unexpected(error: BaseException) -> Outcome:
    """A defect of ours: its traceback is printed, the code is that of a failure."""
    traceback.print_exception(error)
    return Outcome(FAILED, f"{type(error).__name__}: {error}")


# Jobs: module-level functions, so that they can be started in other processes; torch is loaded there

def train_job(config: Mapping[str, Any], folder: Path, ranks: Any, stop: Any) -> Outcome:
    if config["dry"]:
        from deepvit.run.forecast import forecast
        found = forecast(config, ranks, stop)
        return Outcome(STOPPED if found is None else DONE, value=found)
    from deepvit.engine.folder import RunFolder
    from deepvit.run.train import train
    if not train(config, folder, ranks, stop):
        return Outcome(STOPPED)
    return Outcome(DONE, value={"top1": RunFolder(folder).read_result().get("top1")})


def eval_job(config: Mapping[str, Any], folder: Path, ranks: Any, stop: Any) -> Outcome:
    from deepvit.run import evaluate, knn
    results = (evaluate.evaluate_all if config["knn"] is None else knn.neighbours_of_all)(config, ranks, stop)
    return Outcome(STOPPED if results is None else DONE, "" if results else "Stopped on request.", results)
