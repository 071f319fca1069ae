"""The ResNet of Google's hybrids (R50+ViT-B/16), in Google's arithmetic and in ViT-pytorch's.

The two compute different things from the same weights: with Google's published R50 file only `google` is faithful.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from timm.layers import pad_same
from torch import Tensor, nn

GROUPS = 32


class Arithmetic(NamedTuple):
    """Where google-research/vision_transformer and jeonsworld/ViT-pytorch part.

    same_padding: pad as TensorFlow's SAME (more at the end), also before the max-pool, or symmetrically and there none.
    eps_outside: weights are divided by `std + 1e-5`, or by `sqrt(var + 1e-5)`.
    shortcut_groups, shortcut_eps: the GroupNorm of a projected shortcut; None: a group per channel.
    """

    same_padding: bool
    eps_outside: bool
    shortcut_groups: int | None
    shortcut_eps: float


ARITHMETICS = {"google": Arithmetic(True, True, GROUPS, 1e-6),
               "vit_pytorch": Arithmetic(False, False, None, 1e-5)}


class StdConv2d(nn.Conv2d):
    """Convolution without bias whose weights are standardised per output channel (arXiv:1903.10520)."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, rule: Arithmetic):
        super().__init__(cin, cout, kernel, stride, bias=False)
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        var, mean = self.weight.var((1, 2, 3), correction=0, keepdim=True), self.weight.mean((1, 2, 3), keepdim=True)
        std = var.sqrt() + 1e-5 if self.rule.eps_outside else (var + 1e-5).sqrt()
        weight = (self.weight - mean) / std
        if self.rule.same_padding:
            return F.conv2d(pad_same(x, list(self.kernel_size), list(self.stride)), weight, stride=self.stride)
        return F.conv2d(x, weight, stride=self.stride, padding=self.kernel_size[0] // 2)


class Root(nn.Module):
    """7x7 convolution with stride 2, GroupNorm, ReLU, 3x3 max-pool with stride 2."""

    def __init__(self, in_chans: int, width: int, rule: Arithmetic):
        super().__init__()
        self.rule = rule
        self.conv = StdConv2d(in_chans, width, 7, 2, rule)
        self.gn = nn.GroupNorm(GROUPS, width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.gn(self.conv(x)))  # [B, width, height/2, width/2]
        if self.rule.same_padding:
            x = pad_same(x, [3, 3], [2, 2], value=float("-inf"))
        return F.max_pool2d(x, 3, 2)


class Unit(nn.Module):
    """Bottleneck: 1x1, 3x3 (with the stride), 1x1 to four times the width; the sum goes through a ReLU."""

    def __init__(self, cin: int, width: int, stride: int, rule: Arithmetic):
        super().__init__()
        cout = 4 * width
        self.conv1, self.gn1 = StdConv2d(cin, width, 1, 1, rule), nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.conv2, self.gn2 = StdConv2d(width, width, 3, stride, rule), nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.conv3, self.gn3 = StdConv2d(width, cout, 1, 1, rule), nn.GroupNorm(GROUPS, cout, eps=1e-6)
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = StdConv2d(cin, cout, 1, stride, rule)
            self.gn_proj = nn.GroupNorm(rule.shortcut_groups or cout, cout, eps=rule.shortcut_eps)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.gn_proj(self.downsample(x))
        x = F.relu(self.gn1(self.conv1(x)))
        x = F.relu(self.gn2(self.conv2(x)))
        return F.relu(shortcut + self.gn3(self.conv3(x)))


def make_body(layers: Sequence[int], width: int, rule: Arithmetic) -> tuple[nn.Sequential, int]:
    """The stages, `layers` units each, and the channels of the last: the first keeps its size, each other halves it."""
    body, channels = nn.Sequential(), width
    for stage, units in enumerate(layers):
        block = nn.Sequential()
        for unit in range(units):
            stride = 2 if stage and not unit else 1
            block.add_module(f"unit{unit + 1}", Unit(channels, width * 2**stage, stride, rule))
            channels = 4 * width * 2**stage
        body.add_module(f"block{stage + 1}", block)
    return body, channels
