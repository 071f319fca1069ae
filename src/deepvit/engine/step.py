"""One optimizer update: the mathematics of a training step, apart from the bookkeeping of the loop."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from deepvit.engine.nonfinite import Examination, examine
from deepvit.engine.ranks import Ranks
from deepvit.engine.schedule import Schedule
from deepvit.engine.state import TrainState
from deepvit.errors import UserError

Prepare = Callable[..., tuple[Tensor, Tensor]]  # (batch, step, device, training) -> images, targets
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (network, images, targets) -> mean loss


class Masks(Protocol):
    """Randomness of the model that belongs to an image's place in the global batch (stochastic depth)."""

    def draw(self, batch_index: int, batch_size: int) -> None:
        """Draws for all images of a global batch."""

    def place(self, start: int, stop: int) -> None:
        """Hands the model the part of the images that it sees next."""


@dataclass(frozen=True)
class Precision:
    """`dtype` of autocast (None: fp32 throughout); `scale_gradients` for fp16; `tf32` for float32 products on a GPU."""

    dtype: torch.dtype | None = None
    scale_gradients: bool = False
    tf32: bool = False

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.dtype, enabled=self.dtype is not None)


class Status(IntEnum):
    """How the passes over a global batch ended. The ranks agree on the gravest."""

    DONE = 0
    STOP = 1  # done, and asked to stop
    OUT_OF_MEMORY = 2
    GIVEN_UP = 3  # asked to stop between two micro-batches
    ERROR = 4  # no batch to pass


class Update:
    """What became of a global batch; the same on all ranks, but for `local_loss`.

    Attributes:
        batch_index: of the global batch.
        loss: mean over the global batch; `local_loss`: over this rank's part; `grad_norm`: before clipping. Scalars.
        found_nonfinite: bool scalar: loss or gradient is not finite, so nothing was changed.
    """

    def __init__(self, batch_index: int, loss: Tensor, local_loss: Tensor, grad_norm: Tensor):
        self.batch_index, self.loss, self.local_loss, self.grad_norm = batch_index, loss, local_loss, grad_norm
        self.found_nonfinite = ~torch.isfinite(loss + grad_norm)
        self._answer = self.found_nonfinite.to("cpu", non_blocking=True)  # to pinned memory, while the device goes on
        self._answered = _event(loss)
        self._queued: torch.cuda.Event | None = None

    @property
    def skipped(self) -> bool:
        """Waits until the device has come to the end of this update's backward pass, no further."""
        if self._answered is not None:
            self._answered.synchronize()
        return bool(self._answer)

    def mark_queued(self) -> None:
        """Called when all that belongs to this update was given to the device."""
        self._queued = _event(self.loss)

    def idle_s(self) -> float:
        """How long the device has had nothing to do since this update; a CPU idles whenever the host waits: inf."""
        if self._queued is None:
            return float("inf")
        if not self._queued.query():
            return 0.0
        now = _event(self.loss)
        now.synchronize()
        return self._queued.elapsed_time(now) / 1000


def cross_entropy(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean over the images, in float32; targets are classes `[B]` or probabilities `[B, C]`."""
    return nn.functional.cross_entropy(network(x).float(), y)


def binary_cross_entropy(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A logistic loss for each class, mean over images and classes, in float32; targets as in `cross_entropy`.

    Wightman et al., "ResNet strikes back", arXiv:2110.00476; DeiT III, arXiv:2204.07118.
    """
    logits = network(x).float()  # [B, C]
    y = y if y.ndim == 2 else nn.functional.one_hot(y, logits.shape[1])
    return nn.functional.binary_cross_entropy_with_logits(logits, y.to(logits))


OBJECTIVES: dict[str, Objective] = {"cross_entropy": cross_entropy, "bce": binary_cross_entropy}


@dataclass
class Stepper:
    """What every update has in common.

    Args:
        network: the state's model as it is called (perhaps compiled).
        unit: images of a micro-batch that must stay together (a group of the head norm, a pair of mixup).
        clip_grad: largest global norm of the gradients; None: as they are.
        limit: images that a micro-batch may have; None: as it comes. Running out of memory halves it.
        advice: `(state, images) -> what would help` where that is no way out.
    """

    network: nn.Module
    prepare: Prepare
    schedule: Schedule
    precision: Precision
    ranks: Ranks
    seed: int
    objective: Objective = cross_entropy
    clip_grad: float | None = None
    masks: Masks | None = None
    unit: int = 1
    limit: int | None = None
    advice: Callable[[TrainState, int], str] = lambda state, images: "take a smaller model"

    def update(self, state: TrainState, batches: Sequence[Any] | None, stop: object = None
               ) -> tuple[Status, Update | None]:
        """One update from this rank's micro-batches of a global batch (None: they could not be made).

        The ranks first agree that every pass of each of them fitted into memory; until then nothing is exchanged that
        one of them could miss. Then loss, statistics and gradients are averaged in one exchange. A loss or gradient
        that is not finite leaves parameters, moments, average and running statistics as they were, by masks on the
        device: the host waits for none of it. `state.step` counts the batch all the same.

        Args:
            stop: true once this rank was asked to stop. Then all ranks give the batch up between two micro-batches.
        Returns:
            the status that all ranks agree on, and the update where it is DONE or STOP; else nothing has changed.
        Raises:
            UserError: not even one `unit` of images fits into memory.
        """
        while True:
            state.statistics.begin()
            status, loss = Status.OUT_OF_MEMORY, None
            try:
                status, loss = self._passes(state, batches, stop)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            status = Status(self.ranks.max(status))  # outside `except`, whose frames hold the activations
            if status <= Status.STOP:
                return status, self._apply(state, self._exchange(state, loss))
            state.optimizer.zero_grad(set_to_none=True)
            state.statistics.put_back()
            if status is not Status.OUT_OF_MEMORY:
                return status, None
            self._halve(state, batches)

    def examine(self, state: TrainState, batches: Sequence[Any], batch_index: int,
                rank: int | None = None) -> Examination:
        """Repeats the passes of a rank (by default this one) over its micro-batches of a global batch, watched module
        by module; nothing is updated."""
        rank = self.ranks.rank if rank is None else rank
        share = sum(map(len, batches))
        self._seed(batch_index, share, rank)
        state.model.train()

        def losses() -> Iterator[Tensor]:
            start = rank * share
            for batch in batches:
                self._place(start, start + len(batch))
                x, y = self.prepare(batch, batch_index, self.ranks.device, training=True)
                with self.precision.autocast(self.ranks.device):
                    loss = self.objective(state.model, x, y)
                yield loss * len(x) / share
                start += len(batch)

        return examine(state.model, losses(), state.scaler.scale)

    def _passes(self, state: TrainState, batches: Sequence[Any] | None, stop: object
                ) -> tuple[Status, Tensor | None]:
        """Gradients of this rank's mean loss, which is returned."""
        if batches is None:
            return Status.ERROR, None
        share = sum(map(len, batches))
        self._seed(state.step, share, self.ranks.rank)
        state.optimizer.zero_grad(set_to_none=True)
        total, start = torch.zeros((), device=self.ranks.device), self.ranks.rank * share
        for number, batch in enumerate(self._cut(batches)):
            if number and self.ranks.any_asked_to_stop(bool(stop)):
                return Status.GIVEN_UP, None
            self._place(start, start + len(batch))
            with record_function("prepare"):
                x, y = self.prepare(batch, state.step, self.ranks.device, training=True)
            with record_function("forward"), self.precision.autocast(self.ranks.device):
                loss = self.objective(self.network, x, y) / (share / len(x))
            with record_function("backward"):
                state.scaler.scale(loss).backward()
            state.statistics.take(len(x) / share)
            total += loss.detach()
            start += len(batch)
        return Status.STOP if stop else Status.DONE, total

    @record_function("exchange")
    def _exchange(self, state: TrainState, local_loss: Tensor) -> Update:
        """Means over the ranks of loss, statistics and gradients, which are then clipped."""
        gradients = [p.grad for p in state.parameters if p.grad is not None]
        loss = local_loss.clone()
        self.ranks.average([loss, state.statistics.moved, *gradients])
        state.scaler.unscale_(state.optimizer)
        return Update(state.step, loss, local_loss, self._clip(state.parameters, gradients))

    @record_function("optimizer")
    def _apply(self, state: TrainState, update: Update) -> Update:
        state.statistics.move(unless=update.found_nonfinite)
        self._set_rate(state)
        if _skips_on_the_device(state.optimizer):
            state.optimizer.grad_scale, state.optimizer.found_inf = None, update.found_nonfinite.float()
            state.optimizer.step()
            del state.optimizer.grad_scale, state.optimizer.found_inf
        elif not update.skipped:
            state.optimizer.step()
        state.scaler.update()
        state.step += 1
        if state.ema is not None:
            _average(state, unless=update.found_nonfinite)
        update.mark_queued()
        return update

    def _clip(self, parameters: list[nn.Parameter], gradients: list[Tensor]) -> Tensor:
        """The global norm of the gradients before they are clipped, if they are."""
        if self.clip_grad is not None:
            return nn.utils.clip_grad_norm_(parameters, self.clip_grad)
        return nn.utils.get_total_norm(gradients)

    def _set_rate(self, state: TrainState) -> None:
        rate = self.schedule(state.step + 1)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)

    def _seed(self, batch_index: int, share: int, rank: int) -> None:
        seed_randomness(self.seed, batch_index, rank)  # element-wise dropout
        if self.masks is not None:
            self.masks.draw(batch_index, share * self.ranks.world)

    def _place(self, start: int, stop: int) -> None:
        if self.masks is not None:
            self.masks.place(start, stop)

    def _cut(self, batches: Sequence[Any]) -> Sequence[Any]:
        if self.limit is None:
            return batches
        return [part for batch in batches for part in batch.split(self.limit)]

    def _halve(self, state: TrainState, batches: Sequence[Any]) -> None:
        """Micro-batches of half as many images, in whole units, from now on."""
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        largest = max(len(batch) for batch in self._cut(batches))
        if largest <= self.unit:
            raise UserError(
                f"{largest} images at once do not fit into the memory of this device, and fewer cannot be taken "
                f"together: {self.advice(state, largest)}.")
        self.limit = max(1, largest // self.unit // 2) * self.unit


@torch.no_grad()
def _average(state: TrainState, unless: Tensor) -> None:
    """The average's move after an update, in a few calls for all weights; buffers are copied."""
    averages, weights, copies, buffers = state.averaged
    steps = torch._foreach_sub(weights, averages)
    torch._foreach_mul_(steps, (1 - state.ema.get_decay(state.step)) * ~unless)
    torch._foreach_add_(averages, steps)
    if buffers:
        torch._foreach_copy_(copies, buffers)


def allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """Has a fused optimizer allocate its moments now, by a step that it skips; the others do at their first update."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False) or "betas" not in optimizer.defaults:
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]
               if weight.requires_grad]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones((), device=weights[0].device)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    optimizer.zero_grad(set_to_none=True)


def is_out_of_memory(error: RuntimeError) -> bool:
    """A GPU's allocator has a class of its own; a CPU's only these words."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _event(like: Tensor) -> torch.cuda.Event | None:
    """A mark in the device's queue, on a GPU; who waits for it leaves the core to others."""
    if not like.is_cuda:
        return None
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record()
    return event


def _skips_on_the_device(optimizer: torch.optim.Optimizer) -> bool:
    """Torch's fused optimizers do, as GradScaler asks them to; but SGD's first momentum would then be garbage."""
    return bool(optimizer.state) and getattr(optimizer, "_step_supports_amp_scaling", False)


def seed_randomness(*words: int) -> None:
    """Makes the model's own randomness (dropout) a function of `words`, so none need be saved."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)  # seeds every device
