"""From images to tokens: `[B, in_chans, height, width]` -> `[B, N, D]`, row by row."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from timm.layers import pad_same, resample_patch_embed, to_2tuple
from torch import Tensor, nn

from deepvit import ops
from deepvit.errors import UserError, choose

Size = tuple[int, int]
Pixels = int | Sequence[int]  # one side of a square, or (height, width)
GROUPS = 32  # of the hybrid's group norms


class Stem(nn.Module):
    """Layers with a `stride` in pixels, then `proj`, a convolution that makes one token of each patch: `embed`, which a
    subclass defines. Sizes are (height, width) in pixels, under the names of timm's `PatchEmbed`, whose clients read
    them. UserError: patches that do not tile the image, or are no multiple of the stride."""

    first_conv: ClassVar[str]  # the convolution that sees the image

    def __init__(self, img_size: Size, patch_size: Size, in_chans: int, stride: int = 1):
        super().__init__()
        self.in_chans, self.stride = in_chans, stride
        self._set_sizes(img_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.input_size:
            wanted = ", ".join(map(str, self.input_size))
            raise UserError(f"The images are {tuple(x.shape)}, not (batch, {wanted}): set in_chans or img_size.")
        return self.embed(x)

    input_size = property(lambda self: (self.in_chans, *self.img_size))  # (channels, height, width)
    num_patches = property(lambda self: self.grid_size[0] * self.grid_size[1])

    @property
    def grid_size(self) -> Size:
        """(rows, columns) of patches."""
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | Size:
        """Pixels per token, the larger side or (height, width)."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def set_input_size(self, img_size: Pixels | None = None, patch_size: Pixels | None = None) -> None:
        """Another image size, another patch size (the kernel of `proj` is resampled), or both."""
        before = self.patch_size
        self._set_sizes(to_2tuple(img_size or self.img_size), to_2tuple(patch_size or self.patch_size))
        if self.patch_size != before:
            weight = resample_patch_embed(self.proj.weight.detach(), self.cell)
            self.proj.weight = nn.Parameter(weight, self.proj.weight.requires_grad)
            self.proj.kernel_size = self.proj.stride = self.cell

    @property
    def cell(self) -> Size:
        """The patch in cells of the stride: kernel and stride of `proj`."""
        return self.patch_size[0] // self.stride, self.patch_size[1] // self.stride

    def _set_sizes(self, img_size: Size, patch_size: Size) -> None:
        for pixels, patch in zip(img_size, patch_size):
            if patch < 1 or pixels < patch or pixels % patch:
                raise UserError(f"Patches of {patch_size[0]}x{patch_size[1]} pixels do not tile images of "
                                f"{img_size[0]}x{img_size[1]}: change img_size or patch_size.")
            if patch % self.stride:
                raise UserError(f"patch_size={patch} is not a multiple of this stem's stride of {self.stride} pixels.")
        self.img_size, self.patch_size = img_size, patch_size


class PatchStem(Stem):
    """One convolution with kernel = stride = patch (Dosovitskiy et al., arXiv:2010.11929). With `norm_eps` the patch,
    flattened as `(channel, row, column)`, is layer-normed before it and the token after it, as in vit-pytorch 1.0."""

    first_conv = "proj"

    def __init__(self, img_size: Size, patch_size: Size, in_chans: int, embed_dim: int,
                 norm_eps: float | None = None):
        super().__init__(img_size, patch_size, in_chans)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.cell, self.cell)
        self.norm_in = nn.LayerNorm(in_chans * patch_size[0] * patch_size[1], norm_eps) if norm_eps else None
        self.norm_out = nn.LayerNorm(embed_dim, norm_eps) if norm_eps else None

    def embed(self, x: Tensor) -> Tensor:
        if self.norm_in is None:
            return self.proj(x).flatten(2).mT  # [B, N, D]
        patches = F.unfold(x, self.patch_size, stride=self.patch_size).mT  # [B, N, C*p*p]
        return self.norm_out(F.linear(self.norm_in(patches), self.proj.weight.flatten(1), self.proj.bias))

    def set_input_size(self, img_size: Pixels | None = None, patch_size: Pixels | None = None) -> None:
        if self.norm_in is not None and to_2tuple(patch_size or self.patch_size) != self.patch_size:
            raise UserError("patch_norm has weights for every pixel of a patch: patch_size cannot be changed.")
        super().set_input_size(img_size, patch_size)


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with batch statistics over groups of `norm_batch` consecutive images: see `ops.batch_norm`."""

    def __init__(self, channels: int, norm_batch: int | None):
        super().__init__(channels)
        self.norm_batch = norm_batch

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return ops.batch_norm(x, ops.HeadNorm.of(self), self.training, self.norm_batch)


class ConvStem(Stem):
    """Three convolutions, the DeepViT-S and -L stem: 7x7/2, 3x3, then patch/2 with stride patch/2 (after T2T-ViT).
    `ViT` passes an attention's `norm_batch`, for all batch norms to see the same images: 32 in the published code."""

    first_conv = "conv1"

    def __init__(self, img_size: Size, patch_size: Size, in_chans: int, embed_dim: int, norm_batch: int | None = 32):
        super().__init__(img_size, patch_size, in_chans, stride=2)
        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = GroupedBatchNorm2d(64, norm_batch)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn2 = GroupedBatchNorm2d(64, norm_batch)
        self.proj = nn.Conv2d(64, embed_dim, self.cell, self.cell)

    def embed(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))  # [B, 64, height/2, width/2]
        x = F.relu(self.bn2(self.conv2(x)))
        return self.proj(x).flatten(2).mT  # [B, N, D]


class StdConv2d(nn.Conv2d):
    """Convolution without bias whose weights are standardised per output channel (arXiv:1903.10520), padded as
    TensorFlow's SAME (more at the end) if it is `google`'s, else evenly."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, google: bool):
        super().__init__(cin, cout, kernel, stride, padding=0 if google else kernel // 2, bias=False)
        self.google = google

    def forward(self, x: Tensor) -> Tensor:
        var, mean = self.weight.var((1, 2, 3), correction=0, keepdim=True), self.weight.mean((1, 2, 3), keepdim=True)
        std = var.sqrt() + 1e-5 if self.google else (var + 1e-5).sqrt()
        x = pad_same(x, list(self.kernel_size), list(self.stride)) if self.google else x
        return F.conv2d(x, (self.weight - mean) / std, stride=self.stride, padding=self.padding)


class Root(nn.Module):
    """7x7 convolution with stride 2, GroupNorm, ReLU, 3x3 max-pool with stride 2 (padded in `google`'s alone)."""

    def __init__(self, in_chans: int, width: int, google: bool):
        super().__init__()
        self.conv = StdConv2d(in_chans, width, 7, 2, google)
        self.gn = nn.GroupNorm(GROUPS, width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.gn(self.conv(x)))  # [B, width, height/2, width/2]
        if self.conv.google:
            x = pad_same(x, [3, 3], [2, 2], value=float("-inf"))
        return F.max_pool2d(x, 3, 2)


class Unit(nn.Module):
    """Bottleneck: 1x1, 3x3 (with the stride), 1x1 to four times the width; the sum goes through a ReLU."""

    def __init__(self, cin: int, width: int, stride: int, google: bool):
        super().__init__()
        cout = 4 * width
        self.conv1, self.gn1 = StdConv2d(cin, width, 1, 1, google), nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.conv2, self.gn2 = StdConv2d(width, width, 3, stride, google), nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.conv3, self.gn3 = StdConv2d(width, cout, 1, 1, google), nn.GroupNorm(GROUPS, cout, eps=1e-6)
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = StdConv2d(cin, cout, 1, stride, google)
            self.gn_proj = nn.GroupNorm(GROUPS, cout, eps=1e-6) if google else nn.GroupNorm(cout, cout, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.gn_proj(self.downsample(x))
        x = F.relu(self.gn1(self.conv1(x)))
        x = F.relu(self.gn2(self.conv2(x)))
        return F.relu(shortcut + self.gn3(self.conv3(x)))


class HybridStem(Stem):
    """The ResNet of Google's hybrids (R50+ViT-B/16), then patches of its feature map.

    Args:
        patch_size: a multiple of the ResNet's stride, 4 * 2^(stages - 1) (16 for three stages).
        layers: units per stage; the first stage keeps its size, each other halves it.
        width: channels of the first convolution, a multiple of 32; the stages have 4, 8, 16, ... times as many.
        arithmetic: `google` (faithful to Google's own R50 file), or `vit_pytorch` for weights fine-tuned there."""

    first_conv = "root.conv"

    def __init__(self, img_size: Size, patch_size: Size, in_chans: int, embed_dim: int,
                 layers: Sequence[int] = (3, 4, 9), width: int = 64,
                 arithmetic: Literal["google", "vit_pytorch"] = "google"):
        if not layers or min(layers) < 1 or width < 1 or width % GROUPS:
            raise UserError(f"stem=hybrid takes stages of one unit or more and a width that is a multiple of {GROUPS}: "
                            f"not layers {list(layers)} and width {width}.")
        google = choose("stem.arithmetic", arithmetic, {"google": True, "vit_pytorch": False})
        if len(layers) == 1 and not google:  # its pooling drops a row, which only a further stage's stride makes up for
            raise UserError("stem=hybrid of one stage has no arithmetic=vit_pytorch: give layers of two, or google.")
        super().__init__(img_size, patch_size, in_chans, stride=4 * 2 ** (len(layers) - 1))
        self.root = Root(in_chans, width, google)
        self.body, channels = nn.Sequential(), width
        for stage, units in enumerate(layers):
            block = nn.Sequential()
            for unit in range(units):
                stride = 2 if stage and not unit else 1
                block.add_module(f"unit{unit + 1}", Unit(channels, width * 2**stage, stride, google))
                channels = 4 * width * 2**stage
            self.body.add_module(f"block{stage + 1}", block)
        self.proj = nn.Conv2d(channels, embed_dim, self.cell, self.cell)

    def embed(self, x: Tensor) -> Tensor:
        return self.proj(self.body(self.root(x))).flatten(2).mT  # [B, N, D]


STEMS: dict[str, type[Stem]] = {"patch": PatchStem, "conv": ConvStem, "hybrid": HybridStem}


def stem_of(stem: str | Mapping[str, Any]) -> tuple[type[Stem], dict[str, Any]]:
    """Class and options of `"hybrid"` or `{"name": "hybrid", "layers": [3, 4, 9]}`."""
    options = {"name": stem} if isinstance(stem, str) else dict(stem)
    return choose("stem", str(options.pop("name", None)), STEMS), options


def plain(size: Size) -> int | list[int]:
    """The size as a config has it: one number for a square."""
    return size[0] if size[0] == size[1] else list(size)
