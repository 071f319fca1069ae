"""The learning rate as a pure function of the step, and when what is due."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Warm-up, decay, cooldown. Update number `step` counts from 1 to `total`, so the first update already moves. From
    `warmup_lr` to the peak `lr` in `warmup_steps` updates; down to `min_lr` until update `steps`, by a decay of `kind`;
    there for `cooldown_steps`. The decay's clock starts (`decay_from`) at the end of the `warmup`, as in ViT-pytorch,
    or at the `start` of the run, as in the published DeepViT recipe and timm's default."""

    lr: float
    steps: int
    warmup_steps: int = 0
    cooldown_steps: int = 0
    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    decay_from: Literal["warmup", "start"] = "warmup"

    @property
    def total(self) -> int:
        return self.steps + self.cooldown_steps

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.warmup_lr + (self.lr - self.warmup_lr) * step / self.warmup_steps
        offset = self.warmup_steps if self.decay_from == "warmup" else 0
        progress = min(1.0, (step - offset) / max(1, self.steps - offset))
        return self.min_lr + (self.lr - self.min_lr) * DECAYS[self.kind](progress)


DECAYS = {  # progress 0..1 -> share of the way from min_lr to lr that is left
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def is_due(step: int, every: int | None, total: int) -> bool:
    """Whether something done every `every` steps is due after `step`; the last step is always due; None: only then."""
    return step == total or bool(every) and step % every == 0


@dataclass(frozen=True)
class Plan:
    """When what is due, in steps (None: only after the last)."""

    total: int
    batch_size: int  # images of a global batch
    epoch_size: int  # images of an epoch
    log_every: int = 50
    save_every: int | None = None
    eval_every: int | None = None
    keep_every: int | None = None
    probe_every: int | None = None
    max_skipped: int = 20  # updates skipped in a row (loss or gradient not finite) after which the run stops
    profile: int | None = None  # steps to record, near the start; None: none
