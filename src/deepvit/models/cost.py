"""What a model costs, counted and not timed."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deepvit.models.vit import ViT


def count_flops(model: ViT) -> int:
    """Floating-point operations of one image's forward pass in eval mode: matrix products and convolutions only, a
    multiply-add as two (the published tables count one "MAC"). Counted on the meta device, at no cost."""
    from deepvit.models.registry import build_model
    return forward_flops(lambda: build_model(model.config), model.input_size)


def forward_flops(make: Callable[[], nn.Module], shape: Sequence[int]) -> int:
    """The same of any model that `make()` builds, for an image of `shape` (channels, height, width)."""
    with torch.device("meta"):
        model, image = make().eval(), torch.empty(1, *shape)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(image)
    return counter.get_total_flops()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
