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

    def update(self, state: TrainState, batches: Sequence[Any]) -> dict[str, Tensor]:
        """One update from the micro-batches of one global batch.

        A loss or gradient that is not finite on any rank skips the update on all: parameters, moments, EMA and
        running statistics stay as they were, and the schedule does not move.

        Returns:
            `loss` (this rank's mean), `grad_norm` (before clipping), `skipped` (bool), each a scalar tensor.
        """
        seed_randomness(self.seed, state.batch, self.ranks.rank)
        self._set_rate(state)
        buffers = list(state.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        loss = self._accumulate(state, batches)
        self.ranks.average([buffer for buffer in buffers if buffer.is_floating_point()])
        state.scaler.unscale_(state.optimizer)
        norm = self._clip(state.model)
        skipped = self.ranks.any(not bool(torch.isfinite(loss + norm)))
        state.batch += 1
        if skipped:
            for buffer, kept in zip(buffers, before, strict=True):
                buffer.copy_(kept)
            state.skipped_in_a_row += 1
        else:
            state.scaler.step(state.optimizer)
            state.step += 1
            state.skipped_in_a_row = 0
            if state.ema is not None:
                state.ema.update(state.model, state.step)
        state.scaler.update()
        return {"loss": loss, "grad_norm": norm, "skipped": torch.tensor(skipped)}

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

    def _accumulate(self, state: TrainState, batches: Sequence[Any]) -> Tensor:
        """Gradients of the mean loss over `batches`; the ranks exchange them once, with the last."""
        state.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.ranks.device)
        for number, batch in enumerate(batches, start=1):
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


def seed_randomness(*words: int) -> None:
    """Makes the model's own randomness (dropout, stochastic depth) a function of `words`, so none need be saved."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)  # seeds every device
