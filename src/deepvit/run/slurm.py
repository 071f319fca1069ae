"""Ranks started by plain `srun`, without torchrun: each one's place, from SLURM's variables."""

import logging
import re
from collections.abc import MutableMapping

from deepvit.errors import UserError, reason

PORTS = range(20000, 40000)  # of which a job step takes one by its number
log = logging.getLogger(__name__)


def take_place(environ: MutableMapping[str, str]) -> None:
    """Sets what torchrun would set, in a job step of several tasks; elsewhere nothing.

    A step is recognised by SLURM_STEP_NUM_TASKS; SLURM_NTASKS is set in a batch script too, which is one process.

    Raises:
        UserError: a variable that srun sets is missing or unreadable.
    """
    if "RANK" in environ or environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    try:
        here = _expanded(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]
        step = 31 * int(environ["SLURM_JOB_ID"]) + int(environ["SLURM_STEP_ID"])
        place = {"RANK": environ["SLURM_PROCID"], "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
                 "LOCAL_RANK": environ["SLURM_LOCALID"], "LOCAL_WORLD_SIZE": str(here),
                 "MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]),
                 "MASTER_PORT": str(PORTS[step % len(PORTS)])}
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        raise UserError(f"SLURM_STEP_NUM_TASKS={environ['SLURM_STEP_NUM_TASKS']} is set, but the place of this task "
                        f"cannot be told ({reason(error)}): start with srun, or through torchrun.") from None
    for name, value in place.items():
        environ.setdefault(name, value)
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdecimal() and int(gpus) > here and place["LOCAL_RANK"] == "0":
        log.warning("%s GPUs are on this machine and %d tasks of srun, each of which uses one: start a task for each "
                    "GPU (--ntasks-per-node).", gpus, here)


def first_host(nodes: str) -> str:
    """`gpu[03-05,7]-ib,login1` -> `gpu03-ib`."""
    before, first, behind = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes).groups()
    return before + (first or "") + behind


def _expanded(counts: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]."""
    parts = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups() for part in counts.split(","))
    return [int(count) for count, times in parts for _ in range(int(times or 1))]
