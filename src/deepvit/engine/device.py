"""The device of this process, and its share of the machine."""

import os

import torch

from deepvit.engine.ranks import Ranks
from deepvit.engine.step import Precision


def prepare_device(precision: Precision, ranks: Ranks, threads: int | None = None) -> None:
    """`threads` of this rank (None: on a CPU its share of the cores), and the precision of float32 products."""
    if threads is None and local_world(ranks) > 1 and ranks.device.type == "cpu":
        threads = max(1, usable_cores() // local_world(ranks))
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision.tf32


def local_world(ranks: Ranks) -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))


def usable_cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
