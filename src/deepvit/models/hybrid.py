"""The ResNet stem of Google's hybrids (R50+ViT-B/16), in Google's arithmetic and in ViT-pytorch's.

The two compute different things from the same weights: with Google's published R50 file only `google` is faithful.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch.nn.functional as F
from timm.layers import pad_same
from torch import Tensor, nn

from deepvit.errors import UserError

Size = tuple[int, int]
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


class HybridStem(nn.Module):
    """ResNet, then patches of its feature map: pictures `[B, in_chans, height, width]` -> `[B, N, D]`.

    Args:
        patch_size: in pixels; a multiple of the ResNet's stride, 4 * 2^(stages - 1) (16 for three stages).
        layers: units per stage, (3, 4, 9) in R50+ViT-B/16.
        width: channels of the first convolution; stages put out 4, 8, 16, ... times as many. A multiple of 32.
        arithmetic: `google`, or `vit_pytorch` for weights that were fine-tuned there.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: Size, norm: bool = False, norm_eps: float = 1e-5,
                 layers: Sequence[int] = (3, 4, 9), width: int = 64,
                 arithmetic: Literal["google", "vit_pytorch"] = "google"):
        super().__init__()
        if norm:
            raise UserError("model.patch_norm goes with stem=patch only: leave it off with stem=hybrid.")
        stride = 4 * 2 ** (len(layers) - 1)
        if not layers or min(layers) < 1 or width < 1 or width % GROUPS:
            raise UserError(f"stem=hybrid takes stages of one unit or more and a width that is a multiple of {GROUPS}: "
                            f"not layers {list(layers)} and width {width}.")
        if patch_size[0] % stride or patch_size[1] % stride:
            raise UserError(f"stem=hybrid with {len(layers)} stages has a stride of {stride} pixels: patch_size "
                            f"{patch_size} must be a multiple of it.")
        rule = ARITHMETICS[arithmetic]
        self.root = Root(in_chans, width, rule)
        self.body = nn.Sequential()
        cin = width
        for stage, units in enumerate(layers):
            block = nn.Sequential()
            for unit in range(units):
                stride_here = 2 if stage and not unit else 1
                block.add_module(f"unit{unit + 1}", Unit(cin, width * 2**stage, stride_here, rule))
                cin = 4 * width * 2**stage
            self.body.add_module(f"block{stage + 1}", block)
        cell = (patch_size[0] // stride, patch_size[1] // stride)
        self.proj = nn.Conv2d(cin, embed_dim, cell, cell)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.body(self.root(x))).flatten(2).mT  # [B, N, D]
