"""Gradient checkpointing that leaves the head norm's statistics as if nothing had been recomputed."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepvit.models.attention import SelfAttention


def checkpoint_block(block: nn.Module, *inputs: Any) -> Tensor:
    """`block(*inputs)` that keeps only the inputs for the backward pass."""
    if torch.compiler.is_compiling():  # it never repeats an update of buffers, and supports no contexts
        return checkpoint(block, *inputs, use_reentrant=False)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _without_tracking(block)))


@contextmanager
def _without_tracking(block: nn.Module) -> Iterator[None]:
    norms = [module for module in block.modules() if isinstance(module, SelfAttention)]
    for module in norms:
        module.track_stats = False
    try:
        yield
    finally:
        for module in norms:
            module.track_stats = True
