"""The device of this process, its share of the machine, and how many images fit into its memory at once."""

import ctypes
import logging
import os
import re
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from deepvit.engine.ranks import Ranks
from deepvit.engine.state import TrainState
from deepvit.engine.step import Precision, Stepper, is_out_of_memory
from deepvit.errors import UserError

USEFUL = 2 * 2**30  # bytes kept for the backward pass on a CPU: more images at once bring no speed
USABLE = {"cuda": 0.9, "cpu": 0.5}  # of the memory: a GPU's allocator needs some air, a host's other programs half

log = logging.getLogger(__name__)
Example = Callable[[int], tuple[Tensor, Tensor]]  # number of images -> images and targets, as the model takes them


def prepare_device(precision: Precision, ranks: Ranks, threads: int | None = None, deterministic: bool = False) -> None:
    """Sets this rank's `threads` (None: on a CPU its share of the cores), precision of products, and determinism."""
    if threads is None and local_world(ranks) > 1 and ranks.device.type == "cpu":
        threads = max(1, usable_cores() // local_world(ranks))
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision.tf32
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product


def has_bf16(device: torch.device) -> bool:
    """Whether it is a GPU that multiplies in bfloat16 (from Ampere on)."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 8


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def local_world(ranks: Ranks) -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))


def usable_cores() -> int:
    """Cores that this process may use, by its affinity and by the quotas of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *_quotas()]))


def _quotas(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Whole cores that each control group (v2) around this process leaves it: a container's affinity has all cores."""
    with suppress(OSError):
        group = re.search("^0::/(.*)$", own.read_text(), re.MULTILINE)
        inner = groups / (group[1] if group else "")
        for around in (inner, *inner.parents):
            with suppress(OSError, ValueError):  # ValueError: "max", no limit
                quota, period = map(int, (around / "cpu.max").read_text().split())
                yield quota // period


def sharing() -> int:
    """Runs at once on this process's device: 4 for DEEPVIT_SHARE=1/4, which a sweep sets for cells side by side."""
    value = os.environ.get("DEEPVIT_SHARE") or "1/1"
    one, _, count = value.partition("/")
    if one != "1" or not count.isdecimal() or not int(count):
        raise UserError(f"DEEPVIT_SHARE={value} is not a part of a device: give 1/2, 1/3, ..., or unset it.")
    return int(count)


def available_bytes(device: torch.device, sharing: int = 1) -> int:
    """What this process may still take of what is free, and of its part where `sharing` processes share the device."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        part = USABLE["cuda"] * total / sharing - used_bytes(device)
        return int(min(free - (1 - USABLE["cuda"]) * total, part))
    free, total = _host_memory()
    return int(USABLE["cpu"] * min(free, total / sharing))


def _host_memory() -> tuple[int, int]:
    """Free and total bytes: the machine's, or what the control group or `ulimit` leaves where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _field("/proc/meminfo", "MemAvailable") or total
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        total, free = min(total, int(most)), min(free, int(most) - int(used.read_text()))
    for kind, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            total, free = min(total, most), min(free, most - _field("/proc/self/status", field))
    return free, total


def used_bytes(device: torch.device) -> int:
    """What this process holds now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _field("/proc/self/status", "VmRSS")


def peak_bytes(device: torch.device) -> int:
    """The most that this process held since `reset_peak`. (getrusage's could be that of the process's parent.)"""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _field("/proc/self/status", "VmHWM")


def reset_peak(device: torch.device) -> int:
    """Starts the peak anew from the bytes that are held now, which are returned."""
    give_back()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return used_bytes(device)


def give_back() -> None:
    """Returns to the system what the C library keeps of freed memory, often more than training can use of it."""
    with suppress(AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)


def _field(path: str, name: str) -> int:
    """Bytes, from one of Linux's files of "name: number kB"; 0 on another system."""
    with suppress(FileNotFoundError):
        return 1024 * int(re.search(rf"^{name}:\s*(\d+)", Path(path).read_text(), re.MULTILINE)[1])
    return 0


def kept_storages(compute: Callable[[], Tensor], own: Iterable[Tensor]) -> list[int]:
    """Bytes of each distinct storage that `compute()` saves for backward, those of `own` left out."""
    known = {x.untyped_storage().data_ptr() for x in own}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        compute()
    return [size for address, size in kept.items() if address not in known]


def largest_batch(sizes: Sequence[int], state: TrainState, stepper: Stepper, example: Example, sharing: int = 1
                  ) -> tuple[int, str]:
    """The largest of `sizes` (descending) that fits on this rank's device, which `sharing` processes share, else the
    last; and how much of the memory it takes, in words. On a GPU a trial pass has the last word."""
    device = stepper.ranks.device
    fixed, each = needed_bytes(state, stepper, example)
    budget = available_bytes(device, sharing)
    most = budget if device.type == "cuda" else min(budget, USEFUL)
    fitting = [one for one in sizes if fixed + one * each <= most] or sizes[-1:]
    size = next(one for one in fitting if one == sizes[-1] or _passes(state, stepper, example, one))
    needed = fixed + size * each
    if device.type == "cpu" and needed > budget / USABLE["cpu"]:  # the system would kill the run without a word
        log.warning("%d images at once may not fit into memory: %s.", size, stepper.advice(state, size))
    return size, f"{needed / 2**30:.3g} of {budget / 2**30:.3g} GiB"


def needed_bytes(state: TrainState, stepper: Stepper, example: Example) -> tuple[int, int]:
    """Bytes that an update needs besides the state: a fixed part, and a part per image. Nothing is left changed."""
    counts = (2, 2, 4) if stepper.ranks.device.type == "cuda" else (2, 4)  # the first pass allocates cuBLAS's workspace
    with state.traceless():
        *_, two, four = (_bytes_of(state, stepper, example, count) for count in counts)
    each = max(1, (four - two) // 2)
    weights = sum(weight.nbytes for weight in state.model.parameters())
    # Besides the passes: the average's moves, and the one exchange between ranks.
    return max(0, two - 2 * each) + weights * ((state.ema is not None) + 2 * (stepper.ranks.world > 1)), each


def _bytes_of(state: TrainState, stepper: Stepper, example: Example, count: int) -> int:
    """A GPU's peak over a forward and backward pass; on a CPU, which reports no peak, what is kept for backward."""
    x, y = example(count)
    if not x.is_cuda:
        own = [x, y, *state.model.parameters(), *state.model.buffers()]
        return sum(kept_storages(lambda: stepper.loss(state.model, x, y), own))
    before = reset_peak(x.device)
    stepper.loss(state.model, x, y).backward()
    state.optimizer.zero_grad(set_to_none=True)
    return peak_bytes(x.device) - before


def _passes(state: TrainState, stepper: Stepper, example: Example, size: int) -> bool:
    """On a GPU, whether a forward and backward pass over so many images fits."""
    if stepper.ranks.device.type != "cuda":
        return True
    with state.traceless():
        try:
            stepper.loss(state.model, *example(size)).backward()  # compiled it takes no more, but minutes
            return True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    torch.cuda.empty_cache()  # after the except block, whose frames hold the activations
    return False
