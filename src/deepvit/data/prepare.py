"""On the device: normalise, mix, erase, and make the targets. Everything random here is a function of (seed, step)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data.mixup import one_hot
from torch import Tensor

from deepvit.data.loader import Batch
from deepvit.data.stream import stable_hash
from deepvit.errors import UserError


def mixes(asked: Any) -> bool:
    """Whether training needs partners, so micro-batches of even size. `asked`: `Prepare`, or settings of its names."""
    return asked.mix_prob > 0 and (asked.mixup > 0 or asked.cutmix > 0)


@dataclass
class Prepare:
    """Batch of uint8 -> what the model and the loss take; in training with mixup (arXiv:1710.09412) or cutmix
    (arXiv:1905.04899) in timm's batch mode, then the erasing drawn with the sample. The partner of position p of the
    global batch is p ^ 1, and one lambda or rectangle serves a whole step: ranks and accumulation change nothing."""

    mean: Tensor | tuple[float, ...]  # per channel, of values in 0..1; afterwards [1, 3, 1, 1], of 0..255
    std: Tensor | tuple[float, ...]
    num_classes: int
    mixup: float = 0.0  # alpha of the Beta distribution, as `cutmix`; 0 is off
    cutmix: float = 0.0
    mix_prob: float = 1.0  # that a step is mixed at all
    switch_prob: float = 0.5  # that it is cutmix where both are on
    label_smoothing: float = 0.0  # part of the target that is spread over all classes
    seed: int = 0

    def __post_init__(self) -> None:
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) * 255 for values in (self.mean, self.std))

    def __call__(self, batch: Batch, step: int, device: torch.device | str, training: bool) -> tuple[Tensor, Tensor]:
        """-> (x float32 [b, 3, S, S] normalised, y): soft targets [b, C] if mixed or smoothed, else int64 [b]."""
        x = batch.images.to(device, non_blocking=True).float()  # channels stay last, as convolutions like them
        if self.mean.device != x.device:
            self.mean, self.std = self.mean.to(x.device), self.std.to(x.device)
        x = x.sub_(self.mean).div_(self.std)
        y = batch.targets.to(device, non_blocking=True)
        if not training:
            return x, y
        if mixes(self):
            x, y = self._mix(x, y, *self.mixing(step, tuple(x.shape[-2:])))
        elif self.label_smoothing > 0:
            y = self._soft(y)
        return batch.erasures.write(x), y

    def mixing(self, step: int, size: tuple[int, int]) -> tuple[float, tuple[int, int, int, int] | None]:
        """(lambda, box (top, bottom, left, right) of cutmix or None) of a step, distributed as in timm's Mixup."""
        random = np.random.default_rng(stable_hash("mix", self.seed, step))
        if random.random() >= self.mix_prob:
            return 1.0, None
        cut = self.cutmix > 0 and (self.mixup <= 0 or random.random() < self.switch_prob)
        alpha = self.cutmix if cut else self.mixup
        lam = float(random.beta(alpha, alpha))
        if not cut:
            return lam, None
        sides = [int(side * np.sqrt(1 - lam)) for side in size]
        centres = [int(random.integers(side)) for side in size]
        (top, bottom), (left, right) = ((max(0, centre - side // 2), min(whole, centre + (side + 1) // 2))
                                        for whole, centre, side in zip(size, centres, sides, strict=True))
        return 1.0 - (bottom - top) * (right - left) / (size[0] * size[1]), (top, bottom, left, right)

    def _soft(self, targets: Tensor) -> Tensor:
        off = self.label_smoothing / self.num_classes
        return one_hot(targets, self.num_classes, 1.0 - self.label_smoothing + off, off)  # [b, C], rows sum to 1

    def _mix(self, x: Tensor, targets: Tensor, lam: float, box: tuple[int, int, int, int] | None
             ) -> tuple[Tensor, Tensor]:
        if len(x) % 2:  # in a preview, which takes the whole batch at once
            raise UserError(f"Mixup and cutmix pair images: give an even data.batch_size, not {len(x)}.")
        y = self._soft(targets)
        if lam == 1.0:
            return x, y
        if box is None:
            x = x * lam + _partners(x) * (1.0 - lam)
        else:
            top, bottom, left, right = box
            x[:, :, top:bottom, left:right] = _partners(x[:, :, top:bottom, left:right])
        return x, y * lam + _partners(y) * (1.0 - lam)


def _partners(rows: Tensor) -> Tensor:
    """Each row's neighbour: 1, 0, 3, 2, ... A copy."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
