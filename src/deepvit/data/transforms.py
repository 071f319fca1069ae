"""Pictures of any size -> uint8 [3, S, S]: the published evaluation crop, and timm's augmentation.

Works on PIL images and on uint8 tensors alike and draws the same random numbers for both, so the decoder changes
pixels by rounding only. Normalisation, erasing and mixing come later, on the device (`prepare.py`).
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor
from torchvision.transforms import RandomHorizontalFlip, RandomVerticalFlip

from deepvit.data.decode import Picture, to_pil, to_tensor
from deepvit.errors import UserError, did_you_mean

INTERPOLATIONS = ("bilinear", "bicubic")
LONGEST = 16  # sides ratio above which a picture is first cut to its middle: 20,000 x 10 would be resized to 123 MP
NORMS = {"half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # as published (dvit_repo's default_cfg)
         "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
         "clip": ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))}

Patch = tuple[int, int, Tensor]  # top, left, normalised values [3, h, w]


def norm_values(norm: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Name of a normalisation -> (mean, std) per channel, of values in 0..1."""
    if norm not in NORMS:
        raise UserError(f"data.norm={norm} is none of {', '.join(NORMS)}.{did_you_mean(norm, NORMS)}")
    return NORMS[norm]


def name_of_norm(mean: Sequence[float] | None, std: Sequence[float] | None) -> str | None:
    """The opposite of `norm_values`; None for others."""
    told = [*(mean or ()), *(std or ())]
    near = [name for name, values in NORMS.items()
            if len(told) == 6 and all(abs(a - b) < 2e-3 for a, b in zip(sum(values, ()), told, strict=True))]
    return near[0] if near else None


def resize(picture: Picture, size: tuple[int, int], interpolation: str) -> Picture:
    """To (height, width) with antialiasing: PIL's filter, or ATen's on uint8 (the same weights, rounded alike)."""
    if isinstance(picture, Image.Image):
        return picture.resize(size[::-1], str_to_pil_interp(interpolation))
    if tuple(picture.shape[1:]) == tuple(size):
        return picture
    batch = picture[None].contiguous(memory_format=torch.channels_last)  # [1, 3, H, W]; the layout of the fast kernel
    return F.interpolate(batch, size=size, mode=interpolation, antialias=True)[0]


def crop(picture: Picture, top: int, left: int, height: int, width: int) -> Picture:
    """The rectangle in pixels; it must lie inside."""
    if isinstance(picture, Image.Image):
        return picture.crop((left, top, left + width, top + height))
    return picture[:, top:top + height, left:left + width]


def shape_of(picture: Picture) -> tuple[int, int]:
    """(height, width)."""
    return (picture.height, picture.width) if isinstance(picture, Image.Image) else tuple(picture.shape[1:])


@dataclass(frozen=True)
class CentreCrop:
    """Shorter side to floor(size / crop_pct), then the middle; timm's arithmetic."""

    size: tuple[int, int]
    crop_pct: float
    interpolation: str

    def __call__(self, picture: Picture) -> Picture:
        height, width = shape_of(picture)
        if max(height, width) > LONGEST * min(height, width):
            picture = self._middle(picture, LONGEST * min(height, width))
            height, width = shape_of(picture)
        want = [math.floor(side / self.crop_pct) for side in self.size]
        new = _cover(height, width, *want)
        top, left = (round((have - side) / 2) for have, side in zip(new, self.size, strict=True))
        return crop(resize(picture, new, self.interpolation), top, left, *self.size)

    @staticmethod
    def _middle(picture: Picture, longest: int) -> Picture:
        sides = shape_of(picture)
        height, width = (min(side, longest) for side in sides)
        return crop(picture, (sides[0] - height) // 2, (sides[1] - width) // 2, height, width)


def _cover(height: int, width: int, want_height: int, want_width: int) -> tuple[int, int]:
    """Size with the aspect kept that just covers the wanted one; torchvision's rounding of the longer side."""
    if want_height * width <= want_width * height:
        return max(want_height, int(want_width * height / width)), want_width
    return want_height, max(want_width, int(want_height * width / height))


class RandomCrop(RandomResizedCropAndInterpolation):
    """timm's random resized crop with timm's draws, for both kinds of pictures."""

    def __init__(self, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float],
                 interpolation: str):
        super().__init__(size, scale, ratio, "bilinear" if interpolation == "random" else interpolation)
        self.names = INTERPOLATIONS if interpolation == "random" else (interpolation,)

    def __call__(self, picture: Picture) -> Picture:
        whole = shape_of(picture)
        blank = torch.empty(1).expand(1, *whole)  # get_params asks it for its size alone
        top, left, height, width = self.get_params(blank, self.scale, self.ratio)
        # Of a picture of few pixels timm draws crops that round to nothing.
        box = min(top, whole[0] - 1), min(left, whole[1] - 1), max(height, 1), max(width, 1)
        name = random.choice(self.names) if len(self.names) > 1 else self.names[0]
        return resize(crop(picture, *box), self.size, name)


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
    """crop -> flips -> colour (PIL), and the rectangles to erase afterwards. Draws from the global generators."""

    size: tuple[int, int]
    crop: Callable[[Picture], Picture]
    flips: list[Callable[[Picture], Picture]] = field(default_factory=list)
    colour: list[Callable[[Image.Image], Image.Image]] = field(default_factory=list)
    erasing: RandomErasing | None = None

    @property
    def random(self) -> bool:
        """Whether it draws any random number."""
        return isinstance(self.crop, RandomCrop) or bool(self.flips or self.colour or self.erasing)

    def __call__(self, picture: Picture) -> tuple[Tensor, list[Patch]]:
        """-> (uint8 [3, S, S], rectangles to erase)."""
        picture = self.crop(picture)
        for step in self.flips:
            picture = step(picture)
        if self.colour:
            picture = to_pil(picture)
            for step in self.colour:
                picture = step(picture)
        pixels = to_tensor(picture) if isinstance(picture, Image.Image) else picture
        return pixels, self._patches()

    def _patches(self) -> list[Patch]:
        if self.erasing is None:
            return []
        recorder = _Recorder((3, *self.size))
        self.erasing(recorder)
        return recorder.patches


def eval_transform(img_size: int | Sequence[int], crop_pct: float = 0.9, interpolation: str = "bicubic") -> Transform:
    """As published: at 224, shorter side to floor(224 / 0.9) = 248, bicubic, centre crop; at 384 crop_pct 1."""
    if not 0 < crop_pct <= 1:
        raise UserError(f"data.crop_pct={crop_pct} must be above 0 and at most 1.")
    _check_interpolation(interpolation, INTERPOLATIONS, "data.interpolation")
    return Transform(_pair(img_size), CentreCrop(_pair(img_size), crop_pct, interpolation))


def train_transform(img_size: int | Sequence[int], *, crop_pct: float = 0.9,
                    crop_scale: Sequence[float] | None = (0.08, 1.0), crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
                    interpolation: str = "random", hflip: float = 0.5, vflip: float = 0.0,
                    color_jitter: float | Sequence[float] | None = 0.4, auto_augment: str | None = None,
                    grayscale_prob: float = 0.0, gaussian_blur_prob: float = 0.0, random_erasing: float = 0.0,
                    erasing_mode: str = "pixel", erasing_count: int = 1,
                    mean: Sequence[float] = (0.5, 0.5, 0.5)) -> Transform:
    """timm's ImageNet augmentation (`transforms_imagenet_train`), the erasing recorded instead of written.

    Args:
        img_size: side or (height, width) in pixels.
        crop_pct: only where `crop_scale` is None: no random crop but the evaluation's.
        crop_scale, crop_ratio: ranges of area (part of the picture) and aspect of the random crop.
        interpolation: `bilinear`, `bicubic` or `random` (one of the two per sample).
        hflip, vflip, grayscale_prob, gaussian_blur_prob: probabilities.
        color_jitter: strength; as in timm it has no effect where `auto_augment` is set (other than `3a`).
        auto_augment: timm's string, e.g. `rand-m9-mstd0.5-inc1`.
        random_erasing: probability; `erasing_mode` const, rand or pixel; up to `erasing_count` rectangles.
        mean: of the normalisation; colour of the pixels that RandAugment moves in.
    """
    size = _pair(img_size)
    _check_interpolation(interpolation, (*INTERPOLATIONS, "random"), "augment.interpolation")
    if gaussian_blur_prob and min(size) < 12:
        raise UserError(f"augment.gaussian_blur_prob={gaussian_blur_prob} needs images of 12 pixels or more, as timm's "
                        f"blur is 23 wide: set it to 0, or raise model.img_size.")
    if crop_scale is None:
        cut = eval_transform(size, crop_pct, "bicubic" if interpolation == "random" else interpolation).crop
    else:
        cut = RandomCrop(size, _range(crop_scale, "crop_scale"), _range(crop_ratio, "crop_ratio"), interpolation)
    flips = [flip(p=p) for flip, p in ((RandomHorizontalFlip, hflip), (RandomVerticalFlip, vflip)) if p > 0]
    colour = _colour(size, interpolation=interpolation, color_jitter=color_jitter or None, mean=mean,
                     auto_augment=auto_augment, grayscale_prob=grayscale_prob, gaussian_blur_prob=gaussian_blur_prob)
    return Transform(size, cut, flips, colour, _erasing(random_erasing, erasing_mode, erasing_count))


def _colour(size: tuple[int, int], *, auto_augment: str | None, **options: object) -> list[Callable]:
    try:
        stages = transforms_imagenet_train(size, separate=True, auto_augment=auto_augment, **options)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"augment.auto_augment={auto_augment} (such as rand-m9-mstd0.5-inc1) and augment.color_jitter="
                        f"{options['color_jitter']} are not both what timm takes ({error}).") from error
    steps = list(stages[1].transforms)
    for step in steps:
        mend_posterize(step)
    return steps


def mend_posterize(step: Callable) -> None:
    """timm's increasing magnitudes reach 0 bits, which was a black picture until PIL 13 made it an error."""
    policies = getattr(step, "policy", [])  # AutoAugment; RandAugment has ops
    for op in [*getattr(step, "ops", []), *(op for policy in policies for op in policy)]:
        if op.aug_fn is timm_posterize:
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options: object) -> Image.Image:
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return timm_posterize(image, bits_to_keep, **options)


def _erasing(probability: float, mode: str, count: int) -> RandomErasing | None:
    if mode not in ("const", "rand", "pixel"):
        raise UserError(f"augment.erasing_mode={mode} is none of const, rand, pixel.")
    return RandomErasing(probability, mode=mode, max_count=count, device="cpu") if probability > 0 else None


def _pair(img_size: int | Sequence[int]) -> tuple[int, int]:
    return (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))


def _range(values: Sequence[float], name: str) -> tuple[float, float]:
    if len(values) != 2 or not 0 < values[0] <= values[1]:
        raise UserError(f"augment.{name}={list(values)} must be [smallest, largest], both above 0.")
    return float(values[0]), float(values[1])


def _check_interpolation(name: str, choices: tuple[str, ...], key: str) -> None:
    if name not in choices:
        raise UserError(f"{key}={name} is none of {', '.join(choices)}.{did_you_mean(name, choices)}")
