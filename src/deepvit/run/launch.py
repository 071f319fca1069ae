"""Where the ranks of a run come from (this process, torch's elastic launcher, torchrun, srun), and what they do."""

import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from deepvit.config.settings import read_group
from deepvit.engine.signals import handled_signals
from deepvit.errors import BAD_INPUT, DONE, FAILED, STOPPED, Failure, UserError, reason
from deepvit.run.console import set_up_logging

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher tells every rank
SLURM_PORTS = range(20000, 40000)  # a job step takes one by its number
START_METHOD = "spawn"  # of the ranks: CUDA does not survive a fork
FOLDER_SOURCES = ("folder", "imagenet")  # of data; the others may download theirs to `data.root`
SCHEME = re.compile(r"[a-z-]+:")  # of a name that is no path: `timm:vit_small_patch16_224`

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a job ended, in a form that crosses processes."""

    code: int = DONE
    message: str = ""  # if it went wrong
    value: dict[str, Any] = field(default_factory=dict)  # what it found
    retry: bool = False  # starting all ranks again may help


class Stopped(Exception):
    """Raised by a job that was asked to stop, on all ranks alike; with a sentence if it has not said so yet."""


Job = Literal["train", "eval"]
Runner = Callable[[Job, Mapping[str, Any], Path], Outcome]


def launcher(config: Mapping[str, Any], folder: Path) -> Runner:
    """What runs a job, and returns rank 0's outcome, on as many ranks as `config["engine"]` asks for (null: every
    visible GPU, or one process on a CPU): this process, or torch's elastic launcher, which restarts ranks that die, all
    together. UserError for what can be refused before torch is imported."""
    read_group("engine", config.get("engine"))
    _refuse_missing_paths(config, folder)
    if joined():
        refuse_other_count(config["engine"])
        return run_rank
    devices = _devices(config["engine"])
    return partial(_run_ranks, devices=devices) if devices > 1 else run_rank


def _refuse_missing_paths(config: Mapping[str, Any], folder: Path) -> None:
    """A misspelled path is answered before torch is imported. A run that `folder` continues does not read `init`."""
    data, named = config.get("data", {}), []
    if data.get("source") in FOLDER_SOURCES:
        if not data.get("root"):
            raise UserError(f"data={data['source']} needs the folder of the images: give data.root=/path/to/it.")
        named = [("data.root", data["root"])]
    checkpoint, resumes = config.get("checkpoint"), (folder / "checkpoints" / "last.pt").exists()
    named += [("checkpoint", path) for path in (checkpoint if isinstance(checkpoint, list) else [checkpoint])]
    if config.get("fresh") or not resumes:
        named.append(("init", config.get("init")))
    for setting, path in named:
        if isinstance(path, str) and not SCHEME.match(path) and not os.path.exists(os.path.expanduser(path)):
            raise UserError(f"{setting}={path} does not exist: check the path, which is taken from {Path.cwd()}.")


def joined() -> bool:
    """Whether a launcher such as torchrun or srun started this process; UserError where its variables are wrong."""
    for name in (*LAUNCHED, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if os.environ.get(name) == "":
            del os.environ[name]  # set to nothing is not set, for whoever reads it
    take_place(os.environ)
    if "RANK" not in os.environ:
        return False
    advice = "start through torchrun, or `unset RANK` to train alone."
    if missing := [name for name in LAUNCHED if name not in os.environ]:
        raise UserError(f"RANK={os.environ['RANK']} is set, but {', '.join(missing)} not: {advice}")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        value, limit = os.environ.get(name, "0"), os.environ["WORLD_SIZE"] if name == "RANK" else "65536"
        if not value.isdecimal() or int(value) >= int(limit):
            raise UserError(f"{name}={value} is not a number below {limit}: {advice}")
    return True


def take_place(environ: MutableMapping[str, str]) -> None:
    """Sets what torchrun would set, from SLURM's variables, in a job step of several tasks that plain `srun` started
    (SLURM_NTASKS is set in a batch script too). UserError where a variable is missing or unreadable."""
    if "RANK" in environ or environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    try:
        here = _tasks_by_node(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]
        step = 31 * int(environ["SLURM_JOB_ID"]) + int(environ["SLURM_STEP_ID"])
        place = {"RANK": environ["SLURM_PROCID"], "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
                 "LOCAL_RANK": environ["SLURM_LOCALID"], "LOCAL_WORLD_SIZE": str(here),
                 "MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]),
                 "MASTER_PORT": str(SLURM_PORTS[step % len(SLURM_PORTS)])}
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        raise UserError(f"SLURM_STEP_NUM_TASKS is set, but this task's place is unknown ({reason(error)}): start with "
                        f"srun, or through torchrun.") from None
    for name, value in place.items():
        environ.setdefault(name, value)
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdecimal() and int(gpus) > here and place["LOCAL_RANK"] == "0":
        log.warning("srun started %d tasks for %s GPUs: start one for each (--ntasks-per-node).", here, gpus)


def first_host(nodes: str) -> str:
    """`gpu[03-05,7]-ib,login1` -> `gpu03-ib`."""
    before, first, behind = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes).groups()
    return before + (first or "") + behind


def _tasks_by_node(counts: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]."""
    parts = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups() for part in counts.split(","))
    return [int(count) for count, times in parts for _ in range(int(times or 1))]


def refuse_other_count(engine: Mapping[str, Any]) -> None:
    """UserError where `engine.devices` asks for another number of processes than a launcher started."""
    wanted, started = engine["devices"], os.environ["WORLD_SIZE"]
    if wanted is not None and str(wanted) not in (started, os.environ.get("LOCAL_WORLD_SIZE")):
        raise UserError(f"engine.devices={wanted}, but torchrun started {started} processes: leave it out, or give "
                        f"torchrun --nproc-per-node={wanted}.")


def _devices(engine: Mapping[str, Any]) -> int:
    import torch

    from deepvit.engine.ranks import pick_device
    wanted = engine["devices"]
    if pick_device(engine["accelerator"]).type == "cpu":
        return wanted or 1
    present = torch.cuda.device_count()
    if (wanted or present) > present:
        raise UserError(f"engine.devices={wanted}, but {present} CUDA devices are visible.")
    return wanted or present


def run_rank(job: Job, config: Mapping[str, Any], folder: Path) -> Outcome:
    """One rank, from joining the others to its outcome; a user's mistake is returned, never raised."""
    from deepvit.engine.ranks import LostRank, join
    from deepvit.engine.signals import stop_requests
    engine = config["engine"]
    set_up_logging(int(os.environ.get("RANK", 0)))
    try:
        with stop_requests() as stop, join(engine["accelerator"], engine["timeout_s"]) as ranks:
            try:
                return Outcome(value=program(job, config, folder)(config, ranks=ranks, stop=stop) or {})
            except Stopped as stopped:
                return Outcome(STOPPED, str(stopped))
    except UserError as error:
        return Outcome(BAD_INPUT, str(error))
    except Failure as error:
        return Outcome(FAILED, str(error), retry=isinstance(error, LostRank))


def run_child(job: Job, config: Mapping[str, Any], folder: Path) -> Outcome:
    """A rank below the elastic launcher, which restarts all ranks if this one *exits* badly."""
    outcome = run_rank(job, config, folder)
    if outcome.retry:
        log.error("%s", outcome.message)
        sys.exit(outcome.code)
    if outcome.code == STOPPED:
        # A launcher that is asked to stop waits for its ranks, and its ranks wait for its word: one must go first.
        signal.signal(signal.SIGALRM, lambda number, frame: os._exit(DONE))
        signal.setitimer(signal.ITIMER_REAL, 1.0)  # second
        sys.stdout.flush()
    return outcome


def _run_ranks(job: Job, config: Mapping[str, Any], folder: Path, devices: int) -> Outcome:
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
        return elastic_launch(setup, run_child)(job, dict(config), folder)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return Outcome(FAILED, f"Rank {rank} {end_of(failure.exitcode)}, and {engine['max_restarts']} restarts did not "
                               f"help (engine.max_restarts): see {folder}/train.log. The same command continues.")
    except SignalException as error:
        return Outcome(STOPPED, f"Stopped on request ({error.sigval.name}).")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def end_of(exitcode: int) -> str:
    """How a process ended, in words."""
    return f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"died (exit code {exitcode})"


def unexpected(error: BaseException) -> Outcome:
    """A defect of ours: its traceback is printed, the code is that of a failure."""
    traceback.print_exception(error)
    return Outcome(FAILED, f"{type(error).__name__}: {error}")


def program(job: Job, config: Mapping[str, Any], folder: Path) -> Callable[..., Mapping[str, Any] | None]:
    """What `config` asks for, `(config, *, ranks, stop) -> what it found`; torch is imported here, with it."""
    if job == "eval":
        from deepvit.run import evaluate, knn
        return evaluate.evaluate_all if config["knn"] is None else knn.neighbours_of_all
    from deepvit.run import measures, train
    return measures.forecast if config["dry"] else partial(train.train, path=folder)
