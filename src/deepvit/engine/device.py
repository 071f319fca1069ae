"""The device of this process, and its share of the machine."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from deepvit.engine.ranks import Ranks
from deepvit.engine.step import Precision
from deepvit.errors import UserError


def prepare_device(precision: Precision, ranks: Ranks, threads: int | None = None, deterministic: bool = False) -> None:
    """`threads` of this rank (None: on a CPU its share of the cores), the precision of float32 products, and whether
    every operation gives the same bits each time."""
    if threads is None and local_world(ranks) > 1 and ranks.device.type == "cpu":
        threads = max(1, usable_cores() // local_world(ranks))
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision.tf32
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product


def local_world(ranks: Ranks) -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))


def usable_cores() -> int:
    """Those that this process may use: by its affinity, and by the quotas of its control groups, where the system
    tells."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *_quotas()]))


def _quotas(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Whole cores that each control group (v2) around this process leaves it: a container has all cores of its machine
    in its affinity, and is halted once it has had its part of their time."""
    with suppress(OSError):
        group = re.search("^0::/(.*)$", own.read_text(), re.MULTILINE)
        inner = groups / (group[1] if group else "")
        for around in (inner, *inner.parents):
            with suppress(OSError, ValueError):  # ValueError: "max", no limit
                quota, period = map(int, (around / "cpu.max").read_text().split())
                yield quota // period


def sharing() -> int:
    """Runs at once on this process's device, by the environment: DEEPVIT_SHARE=1/4 is a quarter of it. A sweep sets it
    for cells that run side by side; `engine.device_batch=auto` takes that part of the memory and no more."""
    value = os.environ.get("DEEPVIT_SHARE") or "1/1"
    one, _, count = value.partition("/")
    if one != "1" or not count.isdecimal() or not int(count):
        raise UserError(f"DEEPVIT_SHARE={value} is no part of a device: give 1/2, 1/3, ..., or unset it.")
    return int(count)


def has_bf16(device: torch.device) -> bool:
    """Whether it is a GPU that multiplies in bfloat16 (from Ampere on)."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 8


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
