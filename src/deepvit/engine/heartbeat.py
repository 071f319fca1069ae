"""How ranks hear of each other outside the collectives: who is at which step, who is gone, who was asked to stop."""

import os
import socket
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

ROLL_CALL_S = 3.0  # how long the ranks that are left wait for each other before they name those that are not


class Heartbeat:
    """Notes in the launcher's key-value store, which outlives a rank.

    Args:
        store: this round's alone; a restarted group must not read the notes of the one before.
    """

    def __init__(self, store: dist.Store, rank: int, world: int):
        self._store, self._rank, self._world = store, rank, world
        self.step = 0
        store.set(f"who/{rank}", f"process {os.getpid()} on {socket.gethostname()}")

    def record_step(self, step: int) -> None:
        """Says that this rank has done `step` updates and begins the next."""
        self.step = step
        self._store.set(f"step/{self._rank}", str(step))

    def any_asked_to_stop(self, asked: bool) -> bool:
        """Whether this rank says so now, or any other has."""
        if asked:
            self._store.set("stop", "1")
        return asked or self._store.check(["stop"])

    def missing(self) -> list[str]:
        """The ranks that do not answer a roll call, in words: `rank 1 (process 71 on n3, begun after step 12)`.

        Every rank that noticed a loss calls this; it takes `ROLL_CALL_S` if one does not.
        """
        deadline, absent = time.monotonic() + ROLL_CALL_S, list(range(self._world))
        try:
            self._store.set(f"here/{self._rank}", "1")
            while absent and time.monotonic() < deadline:
                absent = [rank for rank in absent if not self._store.check([f"here/{rank}"])]
                time.sleep(0.05)
            return [f"rank {rank} ({self._last_words(rank)})" for rank in absent]
        except dist.DistError:  # the store lived in rank 0, without a launcher's
            return ["rank 0 (which kept the ranks' common notes)"]

    def _last_words(self, rank: int) -> str:
        known = [self._store.get(key).decode() for key in (f"who/{rank}", f"step/{rank}") if self._store.check([key])]
        if len(known) < 2:
            return ", ".join([*known, "not yet training"])
        return f"{known[0]}, last heard of after step {known[1]}"


def connect(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """A store for this round of ranks, this process's rank and their number, from the launcher's environment.

    torch's elastic launcher gives restarted ranks the store that their dead predecessors wrote to, and gloo then calls
    at addresses where nobody is left (seen with torch 2.15); so the ranks first agree on a name that is new.

    Raises:
        dist.DistError: the others were not there in time.
    """
    from torch.distributed.rendezvous import rendezvous
    store, rank, world = next(iter(rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    name = _name_round(store, world, timeout) if rank == 0 else _learn_round(store, rank)
    return dist.PrefixStore(name, store), rank, world


def _name_round(store: dist.Store, world: int, timeout: timedelta) -> str:
    """Rank 0 answers every greeting, also a dead rank's, until each rank has confirmed; only then the name holds."""
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
