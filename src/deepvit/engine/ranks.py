"""The processes that train together: who they are, and the few things they must agree on."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepvit.engine.heartbeat import Heartbeat, connect
from deepvit.errors import Failure, UserError, first_line, names_nothing, unusable

CONNECT_S = 60  # for ranks that are all there to connect
ABOUT_RANKS = re.compile("gloo|nccl|connection|timed out|timeout|socket|broken pipe", re.IGNORECASE)  # in an error


class LostRank(Failure):
    """Another rank died or hangs; starting all of them again may help."""


@dataclass(frozen=True)
class Ranks:
    """One process among `world`; with `world == 1` every exchange is free.

    `control` is a gloo group for small host-side decisions, so that none waits for a GPU stream.
    """

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    heartbeat: Heartbeat | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` over the ranks, in place; values live on the host."""
        if self.control is not None:
            dist.all_reduce(values, group=self.control)
        return values

    def max(self, value: int) -> int:
        """The largest of the ranks' values: the way all of them take one decision."""
        if self.control is None:
            return int(value)
        box = torch.tensor(int(value))
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return int(box)

    def from_main(self, value: object) -> object:
        """Rank 0's `value` (plain Python) on every rank."""
        if self.control is None:
            return value
        box = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: object) -> list[object]:
        """Every rank's `value` (plain Python or numpy), in the order of the ranks, on all of them."""
        if self.control is None:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """A sentence that ends the block on one rank ends it on all of them, so that none waits for the others.

        Nothing collective may stand in the block: the ranks would not meet there.
        """
        error = None
        try:
            yield
        except (UserError, Failure) as raised:
            error = raised
        except OSError as raised:
            error = Failure(f"{first_line(raised)}.") if names_nothing(raised) else unusable(raised)
        self.raise_together(error)

    def raise_together(self, error: UserError | Failure | None, flag: bool = False) -> bool:
        """Whether any rank raises `flag`; the first rank's error is raised on all of them."""
        if self.control is None and error is not None:
            raise error
        answers = self.gather((type(error), str(error), flag))
        for kind, text, _ in answers:
            if kind is not type(None):
                raise kind(text) from error
        return any(answer[2] for answer in answers)

    def for_each(self, batches: Iterable[Any], take: Callable[[Any], None], should_stop: Callable[[], bool]) -> bool:
        """Has `take` each of this rank's batches; False, on all ranks, if `should_stop` said yes before one on any.

        Raises:
            UserError, Failure: what any rank's `batches` raised, on all ranks.
        """
        error, stopped = None, False
        try:
            for batch in batches:
                if stopped := should_stop():
                    break
                take(batch)
        except (UserError, Failure) as raised:
            error = raised
        return not self.raise_together(error, stopped)

    def record_step(self, step: int) -> None:
        """Leaves a note of the step reached, for those who might miss this rank."""
        if self.heartbeat is not None:
            self.heartbeat.record_step(step)

    def any_asked_to_stop(self, asked: bool) -> bool:
        """Whether this or any other rank was asked to stop; not collective: any rank may call it at any time."""
        return asked if self.heartbeat is None else self.heartbeat.any_asked_to_stop(asked)

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Sets each tensor to rank 0's."""
        if self.control is not None:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def average(self, tensors: list[Tensor]) -> None:
        """Sets each tensor to its mean over the ranks, all in one exchange."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


@contextmanager
def join(accelerator: str, timeout_s: float) -> Iterator[Ranks]:
    """This process's place: from torchrun's (or the elastic launcher's) environment if there is one, else alone.

    Raises:
        LostRank: another rank did not come, died, or kept the others waiting for more than `timeout_s`.
    """
    device = pick_device(accelerator)
    if "RANK" not in os.environ:
        yield Ranks(0, 1, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks = _meet(device, timedelta(seconds=timeout_s))
    try:
        yield ranks
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not ABOUT_RANKS.search(str(error)):
            raise
        raise LostRank(_lost(ranks, error)) from error
    dist.destroy_process_group()  # after a loss it could wait for the one that is gone


def _meet(device: torch.device, timeout: timedelta) -> Ranks:
    soon = min(timeout, timedelta(seconds=CONNECT_S))
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # its name before 2.15
    try:
        store, rank, world = connect(timeout)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=soon, rank=rank, world_size=world,
                                store=dist.PrefixStore("default", store))
        control = dist.new_group(backend="gloo", timeout=soon)
        for group in (None, control):
            set_timeout(timeout, group)
    except RuntimeError as error:
        raise LostRank(f"Rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE')} did not meet the others: "
                       f"{_reason(error)}.") from error
    return Ranks(rank, world, device, control, Heartbeat(dist.PrefixStore("heartbeat", store), rank, world))


def _lost(ranks: Ranks, error: RuntimeError) -> str:
    missing = ranks.heartbeat.missing()
    who = f"lost {' and '.join(missing)}" if missing else "lost the connection to the others, though all are there,"
    return f"Rank {ranks.rank} {who} at its own step {ranks.heartbeat.step + 1} ({_reason(error)})."


def _reason(error: Exception) -> str:
    """The library's words without its source line and advice."""
    return re.sub(r"^(\[[^]]*\] )+", "", first_line(error)).split(". ")[0].rstrip(".")


def pick_device(accelerator: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as this process's device."""
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("engine.accelerator=cuda, but torch sees no CUDA device here: use engine.accelerator=auto, "
                        "or check the driver and CUDA_VISIBLE_DEVICES.")
    local = int(os.environ.get("LOCAL_RANK", 0))
    by_srun = "SLURM_STEP_NUM_TASKS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if by_srun and torch.cuda.device_count() == 1:
        local = 0  # srun --gpus-per-task=1 shows each task its own GPU alone
    if local >= torch.cuda.device_count():
        raise UserError(f"{local + 1} processes were started on this machine, which has "
                        f"{torch.cuda.device_count()} CUDA devices: lower engine.devices or --nproc-per-node.")
    return torch.device("cuda", local)
