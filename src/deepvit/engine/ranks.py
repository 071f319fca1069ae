"""The processes that train together: who they are, and the few things they must agree on."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from deepvit.engine.pulse import Pulse, connect
from deepvit.errors import Failure, UserError, unusable

CONNECT_S = 60  # for ranks that are all there to connect


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
    pulse: Pulse | None = None

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
    def together(self) -> Iterator[None]:
        """A sentence that ends the block on one rank ends it on all of them, so that none waits for the others.

        Nothing collective may stand in the block: the ranks would not meet there.
        """
        error = None
        try:
            yield
        except (UserError, Failure) as raised:
            error = raised
        except OSError as raised:
            error = unusable(raised)
        self.agree(error)

    def agree(self, error: UserError | Failure | None, flag: bool = False) -> bool:
        """Whether any rank raises `flag`; the first rank's error is raised on all of them."""
        if self.control is None and error is not None:
            raise error
        answers = self.gather((type(error), str(error), flag))
        for kind, text, _ in answers:
            if kind is not type(None):
                raise kind(text) from error
        return any(answer[2] for answer in answers)

    def beat(self, step: int) -> None:
        """Leaves a note of the step reached, for those who might miss this rank."""
        if self.pulse is not None:
            self.pulse.beat(step)

    def any_asked_to_stop(self, asked: bool) -> bool:
        """Whether this or any other rank was asked to stop; unlike `any` it may be called at any time by any rank."""
        if self.pulse is None:
            return asked
        if asked:
            self.pulse.ask_to_stop()
        return asked or self.pulse.asked_to_stop()

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Sets each tensor to rank 0's."""
        if self.world > 1:
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
    except LostRank:
        raise
    except RuntimeError as error:
        if not _is_about_ranks(error):
            raise
        raise LostRank(_lost(ranks, error)) from error
    else:
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
    return Ranks(rank, world, device, control, Pulse(dist.PrefixStore("pulse", store), rank, world))


def _is_about_ranks(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in (
        "gloo", "nccl", "connection", "timed out", "timeout", "socket", "broken pipe"))


def _lost(ranks: Ranks, error: RuntimeError) -> str:
    missing = ranks.pulse.missing()
    who = f"lost {' and '.join(missing)}" if missing else "lost the connection to the others, though all are there,"
    return f"Rank {ranks.rank} {who} at its own step {ranks.pulse.step + 1} ({_reason(error)})."


def _reason(error: Exception) -> str:
    """The library's words without its source line and advice."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^(\[[^]]*\] )+", "", line).split(". ")[0].rstrip(".")


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
