"""The running statistics of a model through one update, so that it moves them once, however it is cut up."""

import torch
from torch import Tensor, nn


class RunningStatistics:
    """The buffers of what is in training mode. Every micro-batch moves them from where they stood before the update,
    and the update moves them by the mean of these moves: exact, since a running mean moves linearly. Counters move by
    one.

    Copies of all buffers lie in one piece of memory, of which the parts are views; so each turn is one call or two.

    Attributes:
        moved: where this rank's micro-batches have moved the floating-point buffers to (flat; empty without any).
    """

    def __init__(self, model: nn.Module):
        moving = [named for module in model.modules() if module.training
                  for named in module.named_buffers(recurse=False)]
        self._floats = [buffer for _, buffer in moving if buffer.is_floating_point()]
        self._counters = [buffer for name, buffer in moving if name == "num_batches_tracked"]
        self._device = next(model.parameters()).device
        self._counted = [counter.clone() for counter in self._counters]
        self._before, self._parts_before = self._like_floats()
        self.moved, self._parts_moved = self._like_floats()

    def _like_floats(self) -> tuple[Tensor, list[Tensor]]:
        sizes = [buffer.numel() for buffer in self._floats]
        flat = torch.zeros(sum(sizes), device=self._device)
        return flat, [part.view_as(buffer) for part, buffer in zip(flat.split(sizes), self._floats, strict=True)]

    @torch.no_grad()
    def begin(self) -> None:
        """Notes where the buffers stand."""
        self.moved.zero_()
        if self._floats:
            torch._foreach_copy_(self._parts_before, self._floats)
        if self._counters:
            torch._foreach_copy_(self._counted, self._counters)

    @torch.no_grad()
    def take(self, share: float) -> None:
        """After a micro-batch of this share of the rank's images: notes its move and takes it back."""
        if self._floats:
            torch._foreach_add_(self._parts_moved, self._floats, alpha=share)
        self.put_back()

    @torch.no_grad()
    def put_back(self) -> None:
        if self._floats:
            torch._foreach_copy_(self._floats, self._parts_before)
        if self._counters:
            torch._foreach_copy_(self._counters, self._counted)

    @torch.no_grad()
    def move(self, unless: Tensor) -> None:
        """Moves the buffers by the update's own move; `unless` (bool scalar) leaves every bit as it was."""
        if self._floats:
            torch.where(unless, self._before, self.moved, out=self.moved)
            torch._foreach_copy_(self._floats, self._parts_moved)
        if self._counters:
            torch._foreach_add_(self._counters, (~unless).to(self._counters[0].dtype))
