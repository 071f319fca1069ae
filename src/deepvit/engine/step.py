"""One optimizer update: the mathematics of a training step, apart from the bookkeeping of the loop."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deepvit.engine.nonfinite import Examination, examine
from deepvit.engine.ranks import Ranks
from deepvit.engine.schedule import Schedule
from deepvit.engine.state import TrainState

Prepare = Callable[..., tuple[Tensor, Tensor]]  # (batch, step, device, training) -> pictures, targets
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (network, pictures, targets) -> mean loss


@dataclass(frozen=True)
class Precision:
    """`dtype` of autocast (None: fp32 throughout); `scale_gradients` for fp16; `tf32` for float32 products on a GPU."""

    dtype: torch.dtype | None = None
    scale_gradients: bool = False
    tf32: bool = False

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.dtype, enabled=self.dtype is not None)


class Update:
    """A global batch on its way into the weights.

    Attributes:
        number: of the global batch.
        loss: mean over this rank's pictures; `grad_norm`: of all ranks, before clipping. Scalar tensors.
        wrong: bool scalar tensor, the same on all ranks: loss or gradient is not finite somewhere.
    """

    def __init__(self, number: int, loss: Tensor, grad_norm: Tensor, wrong: Tensor):
        self.number, self.loss, self.grad_norm, self.wrong = number, loss, grad_norm, wrong
        self._answer = wrong.to("cpu", non_blocking=True)  # to pinned memory, while the device goes on
        self._answered = _event() if wrong.is_cuda else None
        self._made: torch.cuda.Event | None = None

    @property
    def skipped(self) -> bool:
        """Waits until the device has come to the end of this update's backward pass, no further."""
        if self._answered is not None:
            self._answered.synchronize()
        return bool(self._answer)

    def queued(self) -> None:
        """Called when all that belongs to this update was given to the device."""
        self._made = _event() if self.wrong.is_cuda else None

    def idle_s(self) -> float:
        """How long the device has had nothing to do since this update; a CPU idles whenever the host waits: inf."""
        if self._made is None:
            return float("inf")
        if not self._made.query():
            return 0.0
        now = _event()
        now.synchronize()
        return self._made.elapsed_time(now) / 1000


@dataclass(frozen=True)
class Stepper:
    """What every update has in common.

    Args:
        network: the state's model as it is called (DDP, compiled).
        clip_grad: largest global norm of the gradients; None: as they are.
    """

    network: nn.Module
    prepare: Prepare
    objective: Objective
    schedule: Schedule
    precision: Precision
    ranks: Ranks
    seed: int
    clip_grad: float | None = None

    def update(self, state: TrainState, batches: Sequence[Any]) -> Update:
        """One update from the micro-batches of one global batch: `backward`, `step` and `settle` in a row.

        A loss or gradient that is not finite on any rank skips the update on all: parameters, moments, EMA and
        running statistics stay as they were, and the schedule does not move.
        """
        update = self.backward(state, batches)
        self.step(state, update)
        self.settle(state, update)
        return update

    # The device decides whether an update is skipped. So the host may queue the passes of the next batch before it
    # learns what became of this one, and the device never waits for it: backward(k), settle(k - 1), step(k), ...

    def backward(self, state: TrainState, batches: Sequence[Any], give_up: Callable[[], bool] = lambda: False
                 ) -> Update | None:
        """Gradients of one global batch, and the verdict on them. Parameters stay; running statistics move.

        Args:
            give_up: asked between micro-batches; all ranks must answer alike. Then nothing has changed, and None is
                returned.
        """
        seed_randomness(self.seed, state.batch, self.ranks.rank)
        buffers = list(state.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        loss = self._accumulate(state, batches, give_up)
        if loss is None:
            state.optimizer.zero_grad(set_to_none=True)
            for buffer, kept in zip(buffers, before, strict=True):
                buffer.copy_(kept)
            return None
        state.scaler.unscale_(state.optimizer)
        norm = self._clip(state.model)
        everywhere = (loss + norm).clone()
        self.ranks.average([everywhere, *(buffer for buffer in buffers if buffer.is_floating_point())])
        wrong = ~torch.isfinite(everywhere)
        for buffer, kept in zip(buffers, before, strict=True):
            torch.where(wrong, kept, buffer, out=buffer)
        return Update(state.batch, loss, norm, wrong)

    def step(self, state: TrainState, update: Update) -> None:
        """Changes the parameters, unless the update is to be skipped. The one before must be settled."""
        self._set_rate(state)
        if _skips_on_the_device(state.optimizer):
            state.optimizer.grad_scale, state.optimizer.found_inf = None, update.wrong.float()
            state.optimizer.step()
            del state.optimizer.grad_scale, state.optimizer.found_inf
        elif not update.skipped:
            state.optimizer.step()
        state.scaler.update()
        state.batch += 1
        update.queued()

    def settle(self, state: TrainState, update: Update) -> bool:
        """Counts an update and takes it into the average; False if it was skipped. Waits for the device."""
        if update.skipped:
            state.skipped_in_a_row += 1
            return False
        state.step += 1
        state.skipped_in_a_row = 0
        if state.ema is not None:
            state.ema.update(state.model, state.step)
        return True

    def examine(self, state: TrainState, batches: Sequence[Any], number: int, rank: int | None = None) -> Examination:
        """Repeats the passes of a rank (by default this one) over its micro-batches of global batch `number`, looked
        at module by module; nothing is updated."""
        seed_randomness(self.seed, number, self.ranks.rank if rank is None else rank)
        state.model.train()

        def loss(x: Tensor, y: Tensor) -> Tensor:
            with self.precision.autocast(self.ranks.device):
                return state.scaler.scale(self.objective(state.model, x, y) / len(batches))

        seen = []
        for batch in batches:  # all of them: a norm over the ranks meets the others in each
            x, y = self.prepare(batch, number, self.ranks.device, training=True)
            seen.append(examine(state.model, partial(loss, x, y)))
        return next((one for one in seen if one.first), seen[0])

    def _accumulate(self, state: TrainState, batches: Sequence[Any], give_up: Callable[[], bool]) -> Tensor | None:
        """Gradients of the mean loss over `batches`; the ranks exchange them once, with the last."""
        state.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.ranks.device)
        for number, batch in enumerate(batches, start=1):
            if number > 1 and give_up():
                return None
            x, y = self.prepare(batch, state.batch, self.ranks.device, training=True)
            waits = self.ranks.world > 1 and number < len(batches)
            with self.network.no_sync() if waits else nullcontext():
                with self.precision.autocast(self.ranks.device):
                    loss = self.objective(self.network, x, y) / len(batches)
                state.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _clip(self, model: nn.Module) -> Tensor:
        """The global norm of the gradients before they are clipped, if they are."""
        if self.clip_grad is not None:
            return nn.utils.clip_grad_norm_(model.parameters(), self.clip_grad)
        return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

    def _set_rate(self, state: TrainState) -> None:
        rate = self.schedule(state.step + 1)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)


def _event() -> torch.cuda.Event:
    """A mark in the device's queue; who waits for it leaves the core to others."""
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record()
    return event


def _skips_on_the_device(optimizer: torch.optim.Optimizer) -> bool:
    """Torch's fused optimizers do, as GradScaler asks them to; but SGD's first momentum would then be garbage."""
    return bool(optimizer.state) and getattr(optimizer, "_step_supports_amp_scaling", False)


def seed_randomness(*words: int) -> None:
    """Makes the model's own randomness (dropout, stochastic depth) a function of `words`, so none need be saved."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)  # seeds every device
