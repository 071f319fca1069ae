"""The running statistics of a model through one update, so that it moves them once, however it is cut up."""

import torch
from torch import Tensor, nn


class RunningStatistics:
    """A model's buffers. Every micro-batch moves them from where they stood before the update, and the update moves
    them by the mean of these moves: exact, since a running mean moves linearly. Counters move by one.

    Attributes:
        moved: where this rank's micro-batches have moved the floating-point buffers to, as one flat tensor (or none).
    """

    def __init__(self, model: nn.Module):
        self._floats = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._counters = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
        self._before = torch.cat([buffer.flatten() for buffer in self._floats]) if self._floats else None
        self._counted = [counter.clone() for counter in self._counters]
        self.moved: list[Tensor] = []

    @torch.no_grad()
    def take(self, share: float) -> None:
        """After a micro-batch of this share of the rank's images: notes its move and takes it back."""
        if self._before is None:
            return
        now = torch.cat([buffer.flatten() for buffer in self._floats]) * share
        self.moved = [self.moved[0] + now] if self.moved else [now]
        self.put_back()

    @torch.no_grad()
    def put_back(self) -> None:
        if self._before is not None:
            self._write(self._before)
        if self._counters:
            torch._foreach_copy_(self._counters, self._counted)

    @torch.no_grad()
    def move(self, unless: Tensor) -> None:
        """Moves the buffers by the update's own move; `unless` (bool scalar) leaves every bit as it was."""
        if self.moved:
            self._write(torch.where(unless, self._before, self.moved[0]))
        if self._counters:
            torch._foreach_add_(self._counters, (~unless).to(self._counters[0].dtype))

    def _write(self, flat: Tensor) -> None:
        parts = flat.split([buffer.numel() for buffer in self._floats])
        torch._foreach_copy_(self._floats, [part.view_as(buffer) for part, buffer in zip(parts, self._floats)])
