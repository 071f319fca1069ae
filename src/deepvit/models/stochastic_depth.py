"""Stochastic depth whose masks belong to the images, not to the device that they happen to be on."""

import timm.layers
import torch
from torch import Tensor, nn


class DropPath(timm.layers.DropPath):
    """Leaves a residual branch out for some images (Huang et al., "Deep Networks with Stochastic Depth",
    arXiv:1603.09382). By itself it draws as timm's does; `BranchMasks` sets `keep`.

    Attributes:
        keep: `[B]`, 0 or 1 / (1 - rate) for each image of the next batch; None: drawn here.
    """

    keep: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.keep is None or not self.training:
            return super().forward(x)
        return x * self.keep.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class BranchMasks:
    """Masks for all branches of a model: a function of (seed, batch index, place in the global batch, branch), so the
    same on any number of devices and micro-batches."""

    def __init__(self, model: nn.Module, seed: int, device: torch.device):
        self._branches = [module for module in model.modules() if isinstance(module, DropPath)]
        self._rates = torch.tensor([branch.drop_prob for branch in self._branches])  # [branches]
        self._seed, self._device = seed, device
        self._all = self._placed = torch.empty(0, 0)

    def draw(self, batch_index: int, batch_size: int) -> None:
        """Draws the masks of a global batch, on the host."""
        if not self._branches:
            return
        seed = self._seed * 0x9E3779B97F4A7C15 + batch_index & 2**63 - 1
        chance = torch.rand(batch_size, len(self._branches), generator=torch.Generator().manual_seed(seed))
        self._all = (chance >= self._rates) / (1 - self._rates)  # [B, branches]

    def place(self, start: int, stop: int) -> None:
        """Gives every branch the masks of images `start` to `stop` of the global batch, always in the same memory."""
        if not self._branches:
            return
        masks = self._all[start:stop].T.contiguous()  # [branches, b]
        if masks.shape != self._placed.shape:
            self._placed = torch.empty_like(masks, device=self._device)
            for branch, keep in zip(self._branches, self._placed, strict=True):
                branch.keep = keep
        self._placed.copy_(masks.pin_memory() if self._device.type == "cuda" else masks, non_blocking=True)
