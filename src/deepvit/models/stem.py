"""From pictures to tokens: `[B, in_chans, height, width]` -> `[B, N, D]`, row by row."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from deepvit import ops
from deepvit.errors import UserError, did_you_mean
from deepvit.models.hybrid import HybridStem

Size = tuple[int, int]


class PatchStem(nn.Module):
    """One convolution with kernel = stride = patch (Dosovitskiy et al., arXiv:2010.11929).

    With `norm` the flattened patch is layer-normed before the projection and the token after it, as vit-pytorch has
    it since 1.0; the patch is flattened as `(channel, row, column)`.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: Size, norm: bool = False, norm_eps: float = 1e-5):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.norm_in = nn.LayerNorm(in_chans * patch_size[0] * patch_size[1], norm_eps) if norm else None
        self.norm_out = nn.LayerNorm(embed_dim, norm_eps) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_in is None:
            return self.proj(x).flatten(2).mT  # [B, N, D]
        patches = F.unfold(x, self.patch_size, stride=self.patch_size).mT  # [B, N, C*p*p]
        return self.norm_out(F.linear(self.norm_in(patches), self.proj.weight.flatten(1), self.proj.bias))


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with batch statistics over groups of `norm_batch` consecutive images (None: the batch it sees).

    Each training forward moves the running statistics once, as `ops.batch_norm` says.
    """

    def __init__(self, channels: int, norm_batch: int | None):
        super().__init__(channels)
        self.norm_batch = norm_batch

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        norm = ops.HeadNorm(self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum)
        return ops.batch_norm(x, norm, self.training, self.norm_batch)


class ConvStem(nn.Module):
    """Three convolutions, the DeepViT-S and -L stem: 7x7/2, 3x3, then patch/2 with stride patch/2 (after T2T-ViT).

    `norm_batch`: see `GroupedBatchNorm2d`. `ViT` gives the attention's, so that both norms are of the same images.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: Size, norm: bool = False, norm_eps: float = 1e-5,
                 norm_batch: int | None = None):
        super().__init__()
        if norm:
            raise UserError("model.patch_norm goes with stem=patch only: leave it off with stem=conv.")
        if patch_size[0] % 2 or patch_size[1] % 2:
            raise UserError(f"stem=conv halves the picture first: patch_size {patch_size} must be even.")
        half = (patch_size[0] // 2, patch_size[1] // 2)
        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = GroupedBatchNorm2d(64, norm_batch)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn2 = GroupedBatchNorm2d(64, norm_batch)
        self.proj = nn.Conv2d(64, embed_dim, half, half)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))  # [B, 64, height/2, width/2]
        x = F.relu(self.bn2(self.conv2(x)))
        return self.proj(x).flatten(2).mT  # [B, N, D]


STEMS: dict[str, type[nn.Module]] = {"patch": PatchStem, "conv": ConvStem, "hybrid": HybridStem}


def stem_of(stem: str | Mapping[str, Any]) -> tuple[type[nn.Module], dict[str, Any]]:
    """Class and options of `"hybrid"` or `{"name": "hybrid", "layers": [3, 4, 9]}`."""
    options = {"name": stem} if isinstance(stem, str) else dict(stem)
    name = options.pop("name", None)
    if name not in STEMS:
        raise UserError(f"model.stem={name} is not known: choose from {', '.join(STEMS)}.{did_you_mean(name, STEMS)}")
    return STEMS[name], options
