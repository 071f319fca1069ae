"""How a model's parameters start."""

from timm.layers import trunc_normal_
from torch import nn

from deepvit.models.attention import HeadMix
from deepvit.models.blocks import DeepNormBlock


def init_weights(model: nn.Module) -> None:
    """Initialises all of `model` as the published code does.

    | parameter                          | start                                                             |
    |------------------------------------|-------------------------------------------------------------------|
    | Linear weight, pos_embed, cls_token| normal, std 0.02 (cut at +-2 absolute, which cuts nothing)        |
    | Linear bias                        | 0                                                                 |
    | LayerNorm, BatchNorm               | weight 1, bias 0                                                  |
    | convolutions of the stem           | PyTorch's default: uniform, kaiming with a = sqrt(5)              |
    | Theta (`HeadMix`)                  | U(+-1/sqrt(H)), weight and bias, or as `theta_init` says          |
    | LayerScale                         | `init_values`                                                     |
    | temperatures, AttnScale, FeatScale | so that they change nothing                                       |
    | Linear weight in a `DeepNormBlock` | Xavier normal, scaled with depth: see there                       |
    """
    for name, parameter in model.named_parameters(recurse=False):
        if name in ("pos_embed", "cls_token"):
            trunc_normal_(parameter, std=0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, HeadMix):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, DeepNormBlock):
            module.reset_parameters()
