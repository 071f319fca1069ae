"""The processes that train together: who they are, and the few things they must agree on."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepvit.errors import Failure, UserError


@dataclass(frozen=True)
class Ranks:
    """One process among `world`; with `world == 1` every exchange is free.

    `control` is a gloo group for small host-side decisions, so that none waits for a GPU stream.
    """

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` over the ranks, in place; values live on the host."""
        if self.control is not None:
            dist.all_reduce(values, group=self.control)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank raises `flag`: the way all of them take one decision."""
        return bool(self.sum(torch.tensor(int(flag)))) if self.control is not None else flag

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
        """A user's error in the block on one rank becomes the same error on all of them, so that none waits."""
        error = None
        try:
            yield
        except UserError as raised:
            error = str(raised)
        errors = [text for text in self.gather(error) if text is not None]
        if errors:
            raise UserError(errors[0])

    def average(self, buffers: list[Tensor]) -> None:
        """Sets each buffer to its mean over the ranks, in one exchange: running statistics stay equal everywhere."""
        if self.world == 1 or not buffers:
            return
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        dist.all_reduce(flat)
        flat /= self.world
        parts = flat.split([buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` with its gradients averaged over the ranks (DDP); buffers are ours to average."""
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():  # newer torch renames broadcast_buffers, older knows no other name
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False,
                                                       gradient_as_bucket_view=True)


@contextmanager
def join(accelerator: str, timeout_s: float) -> Iterator[Ranks]:
    """This process's place: from torchrun's (or the elastic launcher's) environment if there is one, else alone."""
    device = pick_device(accelerator)
    if "RANK" not in os.environ:
        yield Ranks(0, 1, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        control = dist.new_group(backend="gloo", timeout=timeout)
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, control)
    finally:
        dist.destroy_process_group()


def pick_device(accelerator: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as this process's device."""
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("engine.accelerator=cuda, but torch sees no CUDA device here: use engine.accelerator=auto, "
                        "or check the driver and CUDA_VISIBLE_DEVICES.")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise UserError(f"{local + 1} processes were started on this machine, which has "
                        f"{torch.cuda.device_count()} CUDA devices: lower engine.devices or --nproc-per-node.")
    return torch.device("cuda", local)


@contextmanager
def lost_ranks_named(ranks: Ranks, step: Callable[[], int]) -> Iterator[None]:
    """Turns the collectives' own errors into a sentence that names this rank and the step it reached."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        text = str(error)
        if ranks.world > 1 and any(word in text for word in ("gloo", "NCCL", "Connection", "Timed out", "timeout")):
            raise Failure(f"Rank {ranks.rank} lost another rank after step {step()}: {text.splitlines()[0]}") from error
        raise
