"""Faults put into runs that are started as processes (see soak.py): the targets of `soak.start`."""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import soak
import torch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start_ranks(world: int, target: Callable[..., Any], config: dict[str, Any], folder: Path,
                *arguments: Any) -> list[soak.Run]:
    """Ranks as torchrun starts them, without its watching over them; rank r's words are in `<folder>.r.log`."""
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    return [soak.start(target, config, str(folder), *arguments, folder=folder,
                       log=folder.with_name(f"{folder.name}.{rank}.log"),
                       environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]


def train(config: dict[str, Any], folder: str) -> int:
    return soak._train(config, folder)


def train_with_nan(config: dict[str, Any], folder: str, batches: list[int], rank: int) -> int:
    """The images of these global batches are NaN on one rank."""
    from deepvit.run import build
    original = build.prepare

    def prepare(*arguments: Any, **options: Any):
        made = original(*arguments, **options)

        def poisoned(batch: Any, step: int, device: torch.device, training: bool):
            x, y = made(batch, step, device, training=training)
            wrong = training and step in batches and int(os.environ.get("RANK", 0)) == rank
            return (x * float("nan") if wrong else x), y

        return poisoned

    build.prepare = prepare
    return soak._train(config, folder)


def train_slowly(config: dict[str, Any], folder: str, seconds: float) -> int:
    """Each micro-batch takes this long."""
    from deepvit.data import Prepare
    original = Prepare.__call__

    def slow(self: Prepare, *arguments: Any, training: bool):
        time.sleep(seconds if training else 0)
        return original(self, *arguments, training=training)

    Prepare.__call__ = slow
    return soak._train(config, folder)


def train_with_bad_weights(config: dict[str, Any], folder: str) -> int:
    """One layer's weights overflow in the forward pass from the third update on."""
    from deepvit.engine.step import Stepper
    original = Stepper.update

    def update(self: Stepper, state: Any, batches: Any, stop: object):
        if state.step == 2:
            with torch.no_grad():
                state.model.blocks[1].mlp.fc1.weight.fill_(1e38)
        return original(self, state, batches, stop)

    Stepper.update = update
    return soak._train(config, folder)


def train_with_masks_of_each_rank(config: dict[str, Any], folder: str) -> int:
    """Stochastic depth is drawn where the images are, as outside our engine."""
    from deepvit.models.blocks import BranchMasks
    BranchMasks.place = lambda *_: None
    return soak._train(config, folder)


def train_short_of_memory(config: dict[str, Any], folder: str, where: str, step: int) -> int:
    """Rank 1 runs out of memory once, in its last micro-batch of this step."""
    from deepvit.engine.step import Stepper
    seen = []

    def once() -> None:
        if not seen and os.environ["RANK"] == "1":
            seen.append(where)
            raise torch.OutOfMemoryError("CUDA out of memory")

    original = Stepper._passes

    def passes(self: Stepper, state: Any, *arguments: Any):
        if state.step == step - 1 and where == "forward":
            once()
        result = original(self, state, *arguments)
        if state.step == step - 1 and where == "backward":
            once()
        return result

    Stepper._passes = passes
    if where == "optimizer":
        torch.optim.AdamW.step = lambda *_: once()
    return soak._train(config, folder)


def train_in_parent(config: dict[str, Any], folder: str) -> int:
    """As `train.py` with several devices: this process launches the ranks and watches over them."""
    from deepvit.run import launch
    launch.START_METHOD = "forkserver"  # spares each rank the import of torch
    import multiprocessing
    multiprocessing.set_start_method("forkserver", force=True)
    outcome = launch.launcher(config, Path(folder))("train", config, Path(folder))
    if outcome.message:
        print(outcome.message, flush=True)
    return outcome.code


def ranks_of(folder: Path) -> list[int]:
    """Process ids of the ranks that wrote the newest `start` or `resume`, from what they noted there."""
    begun = [event for event in soak.lines(folder / "events.jsonl") if event["event"] in ("start", "resume")]
    return begun[-1]["processes"] if begun else []


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def stall(process: int) -> None:
    """It neither answers nor dies."""
    os.kill(process, signal.SIGSTOP)
