"""One optimizer update: the mathematics of a training step, apart from the bookkeeping of the loop."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from deepvit.engine.ranks import Ranks
from deepvit.engine.schedule import Schedule
from deepvit.engine.state import TrainState
from deepvit.errors import UserError

Prepare = Callable[..., tuple[Tensor, Tensor]]  # (batch, step, device, training) -> images, targets
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (network, images, targets) -> mean loss


@dataclass(frozen=True)
class Precision:
    """`dtype` of autocast (None: fp32 throughout); `tf32` for float32 products on a GPU."""

    dtype: torch.dtype | None = None
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
    """What became of a global batch, the same on all ranks but for `local_loss`, over this rank's part. Scalars: mean
    `loss`; `grad_norm` before clipping; `found_nonfinite`: one of them is not finite, so nothing was changed."""

    def __init__(self, batch_index: int, loss: Tensor, local_loss: Tensor, grad_norm: Tensor):
        self.batch_index, self.loss, self.local_loss, self.grad_norm = batch_index, loss, local_loss, grad_norm
        self.found_nonfinite = ~torch.isfinite(loss + grad_norm)
        self._answer = self.found_nonfinite.to("cpu", non_blocking=True)  # to pinned memory, while the device goes on
        self._answered = _event(loss)
        self.queued: torch.cuda.Event | None = None  # when all work of this update was given to the device

    @property
    def skipped(self) -> bool:
        """Waits until the device has come to the end of this update's backward pass, no further."""
        if self._answered is not None:
            self._answered.synchronize()
        return bool(self._answer)

    def idle_s(self) -> float:
        """How long the device has had nothing to do since this update; a CPU idles whenever the host waits: inf."""
        if self.queued is None:
            return float("inf")
        if not self.queued.query():
            return 0.0
        now = _event(self.loss)
        now.synchronize()
        return self.queued.elapsed_time(now) / 1000


def cross_entropy(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean over the images, in float32; targets are classes `[B]` or probabilities `[B, C]`."""
    return nn.functional.cross_entropy(network(x).float(), y)


def binary_cross_entropy(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A logistic loss for each class, mean over images and classes, in float32; targets as in `cross_entropy`. Wightman
    et al., "ResNet strikes back", arXiv:2110.00476."""
    logits = network(x).float()  # [B, C]
    y = y if y.ndim == 2 else nn.functional.one_hot(y, logits.shape[1])
    return nn.functional.binary_cross_entropy_with_logits(logits, y.to(logits))


def multi_label(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """`binary_cross_entropy` that wants both classes of a mixed image whole, as the code of DeiT III does."""
    return binary_cross_entropy(network, x, y.gt(0) if y.ndim == 2 else y)


OBJECTIVES: dict[str, Objective] = {"cross_entropy": cross_entropy, "bce": binary_cross_entropy,
                                    "multi_label": multi_label}


@dataclass
class Stepper:
    """What every update has in common. `masks` is the randomness that belongs to an image's place in the global batch
    (stochastic depth): `draw(batch_index, batch_size)` draws it, `place(start, stop)` hands the model its next part."""

    network: nn.Module  # the state's model as it is called (perhaps compiled)
    prepare: Prepare
    schedule: Schedule
    precision: Precision
    ranks: Ranks
    seed: int
    objective: Objective = cross_entropy
    clip_grad: float | None = None  # largest global norm of the gradients
    masks: Any = None
    unit: int = 1  # images of a micro-batch that must stay together (a group of the head norm, a pair of mixup)
    limit: int | None = None  # images that a micro-batch may have; running out of memory halves it
    advice: Callable[[TrainState, int], str] = lambda state, images: "take a smaller model"  # where that is no way out

    def update(self, state: TrainState, batches: Sequence[Any] | None, stop: object = None
               ) -> tuple[Status, Update | None]:
        """One update from this rank's micro-batches of a global batch (None: they could not be made). Returns the
        status that all ranks agree on, and the update where it is DONE or STOP; else nothing has changed. Nothing is
        exchanged before the ranks agree that every pass of each of them fitted into memory. A loss or gradient that is
        not finite leaves parameters, moments, average and running statistics as they were, by masks on the device: the
        host waits for none of it. `state.step` counts the batch all the same. Once `stop` is true on any rank, all give
        the batch up between two micro-batches. UserError if not even one `unit` of images fits."""
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

    def loss(self, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with self.precision.autocast(self.ranks.device):
            return self.objective(network, x, y)

    def seeded(self, batches: Sequence[Any], batch_index: int) -> Iterator[Any]:
        """This rank's micro-batches of a global batch, cut to `limit`; the model's randomness is that of each."""
        rank, share = self.ranks.rank, sum(map(len, batches))  # images
        digest = hashlib.blake2b(repr((self.seed, batch_index, rank)).encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)  # of every device, for element-wise dropout
        if self.masks is not None:
            self.masks.draw(batch_index, share * self.ranks.world)
        start = rank * share
        for batch in self._cut(batches):
            if self.masks is not None:
                self.masks.place(start, start + len(batch))
            yield batch
            start += len(batch)

    def _passes(self, state: TrainState, batches: Sequence[Any] | None, stop: object) -> tuple[Status, Tensor | None]:
        """Gradients of this rank's mean loss, which is returned."""
        if batches is None:
            return Status.ERROR, None
        share = sum(map(len, batches))  # images
        state.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.ranks.device)
        for number, batch in enumerate(self.seeded(batches, state.step)):
            if number and self.ranks.any_asked_to_stop(bool(stop)):
                return Status.GIVEN_UP, None
            if number == 1 and self.network is not state.model:  # CUDA graphs reuse the memory (pytorch/pytorch#169545)
                for weight in state.parameters:
                    weight.grad = None if weight.grad is None else weight.grad.clone()
            with record_function("prepare"):
                x, y = self.prepare(batch, state.step, self.ranks.device, training=True)
            with record_function("forward"):
                loss = self.loss(self.network, x, y) / (share / len(x))
            with record_function("backward"):
                state.scaler.scale(loss).backward()
            state.statistics.take(len(x) / share)
            total += loss.detach()
        return Status.STOP if stop else Status.DONE, total

    @record_function("exchange")
    def _exchange(self, state: TrainState, local_loss: Tensor) -> Update:
        """Means over the ranks of loss, statistics and gradients, which are then clipped."""
        gradients = [p.grad for p in state.parameters if p.grad is not None]
        loss = local_loss.clone()
        self.ranks.average([loss, state.statistics.moved, *gradients])
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.get_total_norm(gradients) if self.clip_grad is None else nn.utils.clip_grad_norm_(
            state.parameters, self.clip_grad)
        return Update(state.step, loss, local_loss, norm)

    @record_function("optimizer")
    def _apply(self, state: TrainState, update: Update) -> Update:
        state.statistics.move(unless=update.found_nonfinite)
        rate = self.schedule(state.step + 1)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        if state.optimizer.state and _is_fused(state.optimizer):  # SGD's first momentum would be garbage
            _step_unless(update.found_nonfinite, state.optimizer)
        elif not update.skipped:
            torch.manual_seed(update.batch_index)  # what timm's Kron draws must be the same on all ranks
            state.optimizer.step()
        state.scaler.update()
        state.step += 1
        state.update_average(unless=update.found_nonfinite)
        update.queued = _event(update.loss)
        return update

    def _cut(self, batches: Sequence[Any]) -> Sequence[Any]:
        return batches if self.limit is None else [part for batch in batches for part in batch.split(self.limit)]

    def _halve(self, state: TrainState, batches: Sequence[Any]) -> None:
        """From now on, micro-batches of half as many images, in whole units."""
        torch.cuda.empty_cache()  # of nothing on a CPU
        largest = max(len(batch) for batch in self._cut(batches))
        if largest <= self.unit:
            raise UserError(f"{largest} images at once do not fit into the memory of this device, and fewer cannot be "
                            f"taken together: {self.advice(state, largest)}.")
        self.limit = max(1, largest // self.unit // 2) * self.unit


def allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """Makes a fused optimizer allocate its moments now, by a step that it skips; others do so at their first update."""
    if not _is_fused(optimizer) or "betas" not in optimizer.defaults:
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.requires_grad]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    _step_unless(torch.ones((), device=weights[0].device), optimizer)
    optimizer.zero_grad(set_to_none=True)


def is_out_of_memory(error: RuntimeError) -> bool:
    """A GPU's allocator has a class of its own; a CPU's has only these words, and oneDNN's kernels theirs."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("allocate memory", "could not create a primitive"))


def _event(like: Tensor) -> torch.cuda.Event | None:
    """On a GPU, a mark in the device's queue; blocking, so whoever waits for it leaves the core to others."""
    if not like.is_cuda:
        return None
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record()
    return event


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the device can leave out its steps, as GradScaler asks torch's fused optimizers to."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def _step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.grad_scale, optimizer.found_inf = None, skip.float()
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
