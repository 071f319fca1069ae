"""How many images fit at once: what a pass takes, measured on a few images, against what this process may have."""

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from deepvit.engine.state import TrainState
from deepvit.engine.step import Stepper, is_out_of_memory

USEFUL = 2 * 2**30  # bytes kept for the backward pass on a CPU: more images at once bring no speed
USABLE = {"cuda": 0.9, "cpu": 0.5}  # of the memory: a GPU's allocator needs some air, a host's other programs half

Example = Callable[[int], tuple[Tensor, Tensor]]  # number of images -> images and targets, as the model takes them


def largest_batch(sizes: Sequence[int], state: TrainState, stepper: Stepper, example: Example, sharing: int = 1
                  ) -> tuple[int, str]:
    """The largest of `sizes` (descending) that fits on this rank's device, and in words what it takes of what.

    The smallest is returned where none fits. Weights, statistics and generators are left as they were.

    Args:
        sharing: processes that share the device.
    """
    device = stepper.ranks.device
    with _traceless(state):
        fixed, each = _needed(state, stepper, example)
        budget = available_bytes(device, sharing)
        most = budget if device.type == "cuda" else min(budget, USEFUL)
        fitting = [size for size in sizes if fixed + size * each <= most] or sizes[-1:]
        for size in fitting:
            if size == sizes[-1] or not _is_too_much(state, stepper, example, size):
                return size, f"{(fixed + size * each) / 2**30:.3g} of {budget / 2**30:.3g} GiB"
    raise AssertionError("the smallest size is always returned")


def needed_bytes(count: int, state: TrainState, stepper: Stepper, example: Example) -> int:
    """What an update with `count` images at once takes beside the state; nothing is left changed."""
    with _traceless(state):
        fixed, each = _needed(state, stepper, example)
    return fixed + count * each


def available_bytes(device: torch.device, sharing: int = 1) -> int:
    """What this process may still take: what is free, and no more than its part where several share the device."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        part = USABLE["cuda"] * total / sharing - used_bytes(device)
        return int(min(free - (1 - USABLE["cuda"]) * total, part))
    free, total = _host_memory()
    return int(USABLE["cpu"] * min(free, total / sharing))


def _host_memory() -> tuple[int, int]:
    """Free and whole, in bytes: the machine's, or the control group's where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = _field("/proc/meminfo", "MemAvailable")
    free = total if available is None else available
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip() != "max":
        total = min(total, int(limit.read_text()))
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free, total


def used_bytes(device: torch.device) -> int:
    """What this process holds now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _field("/proc/self/status", "VmRSS") or 0


def peak_bytes(device: torch.device) -> int:
    """The most that this process held since `reset_peak`.

    On a host this is Linux's own number: getrusage's would be that of the process that started this one.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _field("/proc/self/status", "VmHWM") or 0


def reset_peak(device: torch.device) -> int:
    """Has the peak begin at what is held now, which is returned."""
    give_back()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return used_bytes(device)


def give_back() -> None:
    """To the system, what a C library keeps of the memory that was freed: often more than training can use of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim:
        trim(0)


def _field(path: str, name: str) -> int | None:
    """Bytes, from one of Linux's files of "name: number kB"; None: another system."""
    if not Path(path).exists():
        return None
    lines = dict(line.split(":", 1) for line in Path(path).read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024


def kept_storages(compute: Callable[[], Tensor], own: Iterable[Tensor]) -> list[int]:
    """Bytes of each distinct storage that `compute()` saves for backward, those of `own` left out."""
    known = {x.untyped_storage().data_ptr() for x in own}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = compute()
    del value
    return [size for address, size in kept.items() if address not in known]


@contextmanager
def _traceless(state: TrainState) -> Iterator[None]:
    state.statistics.begin()
    state.model.train()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            state.statistics.put_back()
            state.optimizer.zero_grad(set_to_none=True)


def _loss(network: nn.Module, stepper: Stepper, x: Tensor, y: Tensor) -> Tensor:
    with stepper.precision.autocast(stepper.ranks.device):
        return stepper.objective(network, x, y)


def _needed(state: TrainState, stepper: Stepper, example: Example) -> tuple[int, int]:
    """Bytes of an update whatever it holds, and for each image at once."""
    two, four = (_bytes_of(state, stepper, example, count) for count in (2, 4))
    each = max(1, (four - two) // 2)
    return max(0, two - 2 * each) + _bytes_to_come(state, stepper), each


def _bytes_of(state: TrainState, stepper: Stepper, example: Example, count: int) -> int:
    """A GPU's peak over a pass forward and back; on a CPU, which does not tell, what is kept in between."""
    x, y = example(count)
    if not x.is_cuda:
        own = [x, y, *state.model.parameters(), *state.model.buffers()]
        return sum(kept_storages(lambda: _loss(state.model, stepper, x, y), own))
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    _loss(state.model, stepper, x, y).backward()
    state.optimizer.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated(x.device) - before


def _bytes_to_come(state: TrainState, stepper: Stepper) -> int:
    """What an update adds to its passes: the average's steps, and the one exchange between ranks."""
    weights = sum(weight.nbytes for weight in state.model.parameters())
    return weights * ((state.ema is not None) + 2 * (stepper.ranks.world > 1))


def _is_too_much(state: TrainState, stepper: Stepper, example: Example, size: int) -> bool:
    """On a GPU, whether one real pass runs out of memory after all."""
    if stepper.ranks.device.type != "cuda":
        return False
    try:
        _loss(state.model, stepper, *example(size)).backward()  # compiled it takes no more, but minutes
        return False
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    finally:
        state.optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return True
