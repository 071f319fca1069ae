"""Images of any size -> uint8 [3, S, S]: the published evaluation crop, and timm's augmentation, drawn alike for PIL
images and uint8 tensors. Normalisation, erasing and mixing come later, on the device (`prepare.py`)."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from timm.data.transforms_factory import transforms_imagenet_train
from timm.layers import to_2tuple
from torch import Tensor
from torchvision.transforms.functional import center_crop, crop, get_dimensions, pil_to_tensor

from deepvit.data.decode import AnyImage, to_pil
from deepvit.errors import UserError, choose

INTERPOLATIONS = {"bilinear": ("bilinear",), "bicubic": ("bicubic",), "random": ("bilinear", "bicubic")}
LONGEST = 16  # sides ratio above which an image is first cut to its middle: 20,000 x 10 would be resized to 123 MP
NORMS = {"half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # as published (dvit_repo's default_cfg)
         "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
         "clip": ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))}

Patch = tuple[int, int, Tensor]  # top, left, normalised values [3, h, w]


def norm_values(norm: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Name of a normalisation -> (mean, std) per channel, of values in 0..1."""
    return choose("data.norm", norm, NORMS)


def name_of_norm(mean: Sequence[float] | None, std: Sequence[float] | None) -> str | None:
    """The opposite of `norm_values`; None for others."""
    given = [*(mean or ()), *(std or ())]
    return next((name for name, values in NORMS.items()
                 if len(given) == 6 and np.allclose(sum(values, ()), given, rtol=0, atol=2e-3)), None)


def resize(image: AnyImage, size: tuple[int, int], interpolation: str) -> AnyImage:
    """To (height, width) with antialiasing: PIL's filter, or ATen's on uint8 (the same weights, rounded alike)."""
    if isinstance(image, Image.Image):
        return image.resize(size[::-1], str_to_pil_interp(interpolation))
    if tuple(image.shape[1:]) == tuple(size):
        return image
    batch = image[None].contiguous(memory_format=torch.channels_last)  # [1, 3, H, W]; the layout of the fast kernel
    return F.interpolate(batch, size=size, mode=interpolation, antialias=True)[0]


@dataclass(frozen=True)
class CentreCrop:
    """Shorter side to floor(size / crop_pct), then the middle; timm's arithmetic."""

    size: tuple[int, int]
    crop_pct: float
    interpolation: str

    def __call__(self, image: AnyImage) -> AnyImage:
        _, *sides = get_dimensions(image)
        height, width = (min(side, LONGEST * min(sides)) for side in sides)
        if [height, width] != sides:
            image = crop(image, (sides[0] - height) // 2, (sides[1] - width) // 2, height, width)
        # The aspect kept, the size just covers the wanted one; torchvision's rounding of the longer side.
        high, wide = (math.floor(side / self.crop_pct) for side in self.size)
        if high * width <= wide * height:
            new = max(high, int(wide * height / width)), wide
        else:
            new = high, max(wide, int(high * width / height))
        return center_crop(resize(image, new, self.interpolation), self.size)


class RandomCrop(RandomResizedCropAndInterpolation):
    """timm's random resized crop, with its draws, for both kinds of images."""

    def __init__(self, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float],
                 interpolation: str):
        self.names = INTERPOLATIONS[interpolation]
        super().__init__(size, scale, ratio, self.names[0])

    def __call__(self, image: AnyImage) -> AnyImage:
        _, *whole = get_dimensions(image)
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        # Of an image of few pixels timm draws crops that round to nothing.
        box = min(top, whole[0] - 1), min(left, whole[1] - 1), max(height, 1), max(width, 1)
        name = random.choice(self.names) if len(self.names) > 1 else self.names[0]
        return resize(crop(image, *box), self.size, name)


class _Recorder:
    """Stands for the image that timm's RandomErasing writes into, and keeps what it writes."""

    dtype = torch.float32

    def __init__(self, shape: tuple[int, int, int]):
        self.shape, self.patches = shape, []

    def size(self) -> tuple[int, int, int]:
        return self.shape

    def __setitem__(self, place: tuple[slice, slice, slice], values: Tensor) -> None:
        _, rows, columns = place
        whole = values.expand(self.shape[0], rows.stop - rows.start, columns.stop - columns.start)
        self.patches.append((rows.start, columns.start, whole))


@dataclass
class Transform:
    """crop -> flips -> colour (in PIL), and the rectangles to erase afterwards. Draws from the global generators."""

    size: tuple[int, int]
    crop: Callable[[AnyImage], AnyImage]
    flips: list[Callable[[AnyImage], AnyImage]] = field(default_factory=list)
    colour: list[Callable[[AnyImage], Image.Image]] = field(default_factory=list)
    erasing: RandomErasing | None = None

    def __call__(self, image: AnyImage) -> tuple[Tensor, list[Patch]]:
        """-> (uint8 [3, S, S], rectangles to erase)."""
        for step in (self.crop, *self.flips, *self.colour):
            image = step(image)
        return pil_to_tensor(image) if isinstance(image, Image.Image) else image, self._patches()

    def _patches(self) -> list[Patch]:
        recorder = _Recorder((3, *self.size))
        if self.erasing is not None:
            self.erasing(recorder)
        return recorder.patches


def eval_transform(img_size: int | Sequence[int], crop_pct: float = 0.9, interpolation: str = "bicubic") -> Transform:
    """As published: at 224, shorter side to floor(224 / 0.9) = 248, bicubic, centre crop; at 384 crop_pct 1."""
    size = to_2tuple(img_size)
    return Transform(size, CentreCrop(size, crop_pct, interpolation))


def train_transform(img_size: int | Sequence[int], *, crop_scale: Sequence[float] | None = (0.08, 1.0),
                    crop_ratio: Sequence[float] = (3 / 4, 4 / 3), crop_pct: float = 0.9, interpolation: str = "random",
                    color_jitter: float | Sequence[float] | None = 0.4, random_erasing: float = 0.0,
                    erasing_mode: str = "pixel", erasing_count: int = 1, mean: Sequence[float] = NORMS["half"][0],
                    **timm: Any) -> Transform:
    """timm's ImageNet augmentation to a side or (height, width), the erasing recorded instead of written. crop_scale,
    crop_ratio: ranges of area and aspect; without crop_scale, the evaluation's crop. interpolation: `bilinear`,
    `bicubic`, `random`. mean: colour that RandAugment moves in. timm: hflip, vflip, auto_augment, grayscale_prob ..."""
    size = to_2tuple(img_size)
    choose("augment.interpolation", interpolation, INTERPOLATIONS)
    choose("augment.erasing_mode", erasing_mode, dict.fromkeys(("const", "rand", "pixel")))
    if timm.get("gaussian_blur_prob") and min(size) < 12:
        raise UserError(f"augment.gaussian_blur_prob={timm['gaussian_blur_prob']} needs model.img_size=12 or more.")
    if crop_scale is None:
        cut = CentreCrop(size, crop_pct, "bicubic" if interpolation == "random" else interpolation)
    else:
        cut = RandomCrop(size, _range("crop_scale", crop_scale), _range("crop_ratio", crop_ratio), interpolation)
    try:
        stages = transforms_imagenet_train(
            size, separate=True, interpolation=interpolation, color_jitter=color_jitter or None, mean=mean,
            re_prob=random_erasing, re_mode=erasing_mode, re_count=erasing_count, **timm)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"augment.auto_augment={timm.get('auto_augment')} (such as rand-m9-mstd0.5-inc1) and "
                        f"augment.color_jitter={color_jitter} are not both what timm takes ({error}).") from error
    (_, *flips), colour, final = (list(stage.transforms) for stage in stages)
    for step in colour:
        mend_posterize(step)
    return Transform(size, cut, flips, colour and [to_pil, *colour], final[-1] if random_erasing > 0 else None)


def mend_posterize(step: Callable) -> None:
    """timm's increasing magnitudes reach 0 bits, which was a black image until PIL 13 made it an error."""
    policies = getattr(step, "policy", [])  # AutoAugment; RandAugment has ops
    for op in [*getattr(step, "ops", []), *(op for policy in policies for op in policy)]:
        if op.aug_fn is timm_posterize:
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options: object) -> Image.Image:
    black = Image.new(image.mode, image.size)
    return black if bits_to_keep < 1 else timm_posterize(image, bits_to_keep, **options)


def _range(name: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2 or not 0 < values[0] <= values[1]:
        raise UserError(f"augment.{name}={list(values)} must be [smallest, largest], both above 0.")
    return float(values[0]), float(values[1])
