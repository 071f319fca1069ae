"""The processes that train together: who they are, what they must agree on, and how they notice that one is gone."""

import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from deepvit.errors import Failure, UserError, first_line, names_nothing, unusable

CONNECT_S = 60  # for ranks that are all there to connect
ROLL_CALL_S = 3.0  # how long the remaining ranks wait for each other before they name the missing ones
ABOUT_RANKS = re.compile("gloo|nccl|connection|timed out|timeout|socket|broken pipe", re.IGNORECASE)  # in an error


class LostRank(Failure):
    """Another rank died or hangs; starting all of them again may help."""


@dataclass
class Ranks:
    """One process among `world`; with `world == 1` every exchange is free. `control`: a gloo group for small decisions
    of the hosts, so that none waits for a GPU stream. `heartbeat`: this round's part of the launcher's key-value store,
    for notes outside the collectives that outlive a rank."""

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    heartbeat: dist.Store | None = None
    step: int = 0  # updates done

    def __post_init__(self) -> None:
        self._note("not yet training")

    is_main = property(lambda self: self.rank == 0)

    def max(self, value: int) -> int:
        """The largest of the ranks' values: how they all reach one decision."""
        if self.control is None:
            return int(value)
        box = torch.tensor(int(value))
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return int(box)

    def gather(self, value: object) -> list[object]:
        """Every rank's `value` (plain Python, numpy or on the host), in the order of the ranks, on all of them."""
        if self.control is None:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """An error sentence that ends the block on one rank ends it on all; nothing collective may stand in it."""
        error = None
        try:
            yield
        except (UserError, Failure) as raised:
            error = raised
        except OSError as raised:
            error = Failure(f"{first_line(raised)}.") if names_nothing(raised) else unusable(raised)
        self.raise_together(error)

    def raise_together(self, error: UserError | Failure | None) -> None:
        """Raises the first rank's error on all of them."""
        if first := next(filter(None, self.gather(error)), None):
            raise first

    def for_each(self, batches: Iterable[Any], take: Callable[[Any], None], should_stop: Callable[[], bool]) -> bool:
        """Calls `take` with each of this rank's batches, whose errors all raise; False on all if any `should_stop`."""
        stopped = False
        with self.sync_errors():
            for batch in batches:
                if stopped := should_stop():
                    break
                take(batch)
        return not self.max(stopped)

    def _note(self, words: str) -> None:
        if self.heartbeat is not None:
            self.heartbeat.set(f"rank/{self.rank}", f"process {os.getpid()} on {socket.gethostname()}, {words}")

    def record_step(self, step: int) -> None:
        """Notes that this rank has done `step` updates, for those who might miss it."""
        self.step = step
        self._note(f"last heard of after step {step}")

    def any_asked_to_stop(self, asked: bool) -> bool:
        """Whether this or any other rank was asked to stop; not collective: any rank may call it at any time."""
        if asked and self.heartbeat is not None:
            self.heartbeat.set("stop", "1")
        return asked or self.heartbeat is not None and self.heartbeat.check(["stop"])

    def missing(self) -> list[str]:
        """Who does not answer a roll call of all who noticed a loss, as `rank 1 (last heard of after step 12)`."""
        deadline, absent = time.monotonic() + ROLL_CALL_S, list(range(self.world))
        try:
            self.heartbeat.set(f"here/{self.rank}", "1")
            while absent and time.monotonic() < deadline:
                absent = [rank for rank in absent if not self.heartbeat.check([f"here/{rank}"])]
                time.sleep(0.05)
            known = [rank for rank in absent if self.heartbeat.check([f"rank/{rank}"])]
            last_words = {rank: self.heartbeat.get(f"rank/{rank}").decode() for rank in known}
            return [f"rank {rank} ({last_words.get(rank, 'never heard of')})" for rank in absent]
        except dist.DistError:  # without a launcher the store lived in rank 0
            return ["rank 0 (which kept the ranks' common notes)"]

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Sets each tensor to rank 0's."""
        if self.control is not None:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def average(self, tensors: list[Tensor]) -> None:
        """Sets each tensor to its mean over the ranks, all in one exchange."""
        if self.world == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        torch._foreach_copy_(tensors, views_like(tensors, flat))


def views_like(tensors: list[Tensor], flat: Tensor) -> list[Tensor]:
    """The parts of `flat`, which has the values of all `tensors` in a row, in the shapes of the tensors."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


@contextmanager
def join(accelerator: str, timeout_s: float) -> Iterator[Ranks]:
    """This process's place, from a launcher's environment if there is one. LostRank if another did not come or died."""
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
        missing = ranks.missing()
        who = f"lost {' and '.join(missing)}" if missing else "lost the connection to the others, though all are there,"
        raise LostRank(f"Rank {ranks.rank} {who} at its own step {ranks.step + 1} ({_reason(error)}).") from error
    dist.destroy_process_group()  # after a loss it could wait for the one that is gone


def _meet(device: torch.device, timeout: timedelta) -> Ranks:
    soon = min(timeout, timedelta(seconds=CONNECT_S))
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # its name before 2.15
    try:
        store, rank, world = _new_round(timeout)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=soon, rank=rank, world_size=world,
                                store=dist.PrefixStore("default", store))
        control = dist.new_group(backend="gloo", timeout=soon)
        for group in (None, control):
            set_timeout(timeout, group)
    except RuntimeError as error:
        raise LostRank(f"Rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE')} did not meet the others: "
                       f"{_reason(error)}.") from error
    return Ranks(rank, world, device, control, dist.PrefixStore("heartbeat", store))


def _reason(error: Exception) -> str:
    """The library's words without its source line and advice."""
    return re.sub(r"^(\[[^]]*\] )+", "", first_line(error)).split(". ")[0].rstrip(".")


def _new_round(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """A store for this round of ranks, this process's rank and their number, from the launcher's environment."""
    # torch's elastic launcher gives restarted ranks the store that their dead predecessors wrote to, and gloo then
    # calls addresses where nobody is left (seen with torch 2.15); so the ranks first agree on a new name.
    store, rank, world = next(iter(rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    name = _name_round(store, world, timeout) if rank == 0 else _learn_round(store, rank)
    return dist.PrefixStore(name, store), rank, world


def _name_round(store: dist.Store, world: int, timeout: timedelta) -> str:
    """Rank 0 answers every greeting, even a dead rank's, until each rank has confirmed; only then the name holds."""
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    absent = list(range(1, world))
    while absent:
        for rank in absent:
            if store.check([f"greeting/{rank}"]):
                store.set(f"answer/{store.get(f'greeting/{rank}').decode()}", name)
        absent = [rank for rank in absent if not store.check([f"{name}/confirmed/{rank}"])]
        if absent and time.monotonic() > deadline:
            raise dist.DistStoreError(f"no sign of rank {', '.join(map(str, absent))} in {timeout}")
        time.sleep(0.01)
    store.set(f"{name}/complete", "1")
    return name


def _learn_round(store: dist.Store, rank: int) -> str:
    """A greeting that nobody used before gets an answer that nobody got before."""
    greeting = uuid.uuid4().hex
    store.set(f"greeting/{rank}", greeting)
    name = store.get(f"answer/{greeting}").decode()
    store.set(f"{name}/confirmed/{rank}", "1")
    store.wait([f"{name}/complete"])
    return name


def pick_device(accelerator: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as this process's device."""
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("engine.accelerator=cuda, but torch sees no CUDA device: check the driver, or use auto.")
    count, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    by_srun = "SLURM_STEP_NUM_TASKS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if by_srun and count == 1:
        local = 0  # srun --gpus-per-task=1 shows each task its own GPU alone
    if local >= count:
        raise UserError(f"{local + 1} processes on {count} CUDA devices: lower engine.devices or --nproc-per-node.")
    return torch.device("cuda", local)
