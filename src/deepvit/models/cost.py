"""What a model costs, counted and not timed."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deepvit.models.vit import ViT


def count_flops(model: ViT) -> int:
    """Floating-point operations of one image's forward pass in eval mode: matrix products and convolutions only.

    A multiply-add is two operations (the published tables count it as one "MAC"). Counted on a copy on the meta
    device, so it costs neither time nor memory.
    """
    from deepvit.models.registry import build_model
    with torch.device("meta"):
        copy = build_model(model.config).eval()
        image = torch.empty(1, *model.input_size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            copy(image)
    return counter.get_total_flops()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
