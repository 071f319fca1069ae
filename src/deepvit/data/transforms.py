"""Images of any size -> uint8 [3, S, S]: the published evaluation crop, and timm's augmentation.

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
from torchvision.transforms.functional import crop, get_dimensions

from deepvit.data.decode import AnyImage, to_pil, to_tensor
from deepvit.errors import UserError, did_you_mean

INTERPOLATIONS = ("bilinear", "bicubic")
LONGEST = 16  # sides ratio above which an image is first cut to its middle: 20,000 x 10 would be resized to 123 MP
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
        new = _cover(height, width, *(math.floor(side / self.crop_pct) for side in self.size))
        top, left = (round((have - side) / 2) for have, side in zip(new, self.size, strict=True))
        return crop(resize(image, new, self.interpolation), top, left, *self.size)


def _cover(height: int, width: int, want_height: int, want_width: int) -> tuple[int, int]:
    """Size with the aspect kept that just covers the wanted one; torchvision's rounding of the longer side."""
    if want_height * width <= want_width * height:
        return max(want_height, int(want_width * height / width)), want_width
    return want_height, max(want_width, int(want_height * width / height))


class RandomCrop(RandomResizedCropAndInterpolation):
    """timm's random resized crop with timm's draws, for both kinds of images."""

    def __init__(self, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float],
                 interpolation: str):
        super().__init__(size, scale, ratio, "bilinear" if interpolation == "random" else interpolation)
        self.names = INTERPOLATIONS if interpolation == "random" else (interpolation,)

    def __call__(self, image: AnyImage) -> AnyImage:
        _, *whole = get_dimensions(image)
        blank = torch.empty(1).expand(1, *whole)  # get_params asks it for its size alone
        top, left, height, width = self.get_params(blank, self.scale, self.ratio)
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
    """crop -> flips -> colour (PIL), and the rectangles to erase afterwards. Draws from the global generators."""

    size: tuple[int, int]
    crop: Callable[[AnyImage], AnyImage]
    flips: list[Callable[[AnyImage], AnyImage]] = field(default_factory=list)
    colour: list[Callable[[Image.Image], Image.Image]] = field(default_factory=list)
    erasing: RandomErasing | None = None

    @property
    def random(self) -> bool:
        """Whether it draws any random number."""
        return isinstance(self.crop, RandomCrop) or bool(self.flips or self.colour or self.erasing)

    def __call__(self, image: AnyImage) -> tuple[Tensor, list[Patch]]:
        """-> (uint8 [3, S, S], rectangles to erase)."""
        image = self.crop(image)
        for step in [*self.flips, *([to_pil] if self.colour else []), *self.colour]:
            image = step(image)
        return to_tensor(image) if isinstance(image, Image.Image) else image, self._patches()

    def _patches(self) -> list[Patch]:
        if self.erasing is None:
            return []
        recorder = _Recorder((3, *self.size))
        self.erasing(recorder)
        return recorder.patches


def eval_transform(img_size: int | Sequence[int], crop_pct: float = 0.9, interpolation: str = "bicubic") -> Transform:
    """As published: at 224, shorter side to floor(224 / 0.9) = 248, bicubic, centre crop; at 384 crop_pct 1."""
    return Transform(_pair(img_size), CentreCrop(_pair(img_size), crop_pct, interpolation))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """timm's ImageNet augmentation (`transforms_imagenet_train`); *_prob, hflip and vflip are probabilities."""

    crop_scale: Sequence[float] | None = (0.08, 1.0)  # range of the random crop's area; None: the evaluation's crop
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3)  # range of its aspect
    crop_pct: float = 0.9  # of the evaluation's crop
    interpolation: str = "random"  # `bilinear`, `bicubic` or `random` (one of the two per sample)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float | Sequence[float] | None = 0.4  # as in timm without effect beside `auto_augment` but `3a`
    auto_augment: str | None = None  # timm's string, e.g. `rand-m9-mstd0.5-inc1`
    grayscale_prob: float = 0.0
    gaussian_blur_prob: float = 0.0
    random_erasing: float = 0.0  # probability
    erasing_mode: str = "pixel"  # `const`, `rand` or `pixel`
    erasing_count: int = 1  # rectangles at most
    mean: Sequence[float] = NORMS["half"][0]  # colour of the pixels that RandAugment moves in


def train_transform(img_size: int | Sequence[int], **recipe: object) -> Transform:
    """What `Recipe` says for a side or (height, width) in pixels, the erasing recorded instead of written."""
    asked, size = Recipe(**recipe), _pair(img_size)
    _check_one_of("interpolation", asked.interpolation, (*INTERPOLATIONS, "random"))
    _check_one_of("erasing_mode", asked.erasing_mode, ("const", "rand", "pixel"))
    if asked.gaussian_blur_prob and min(size) < 12:
        raise UserError(f"augment.gaussian_blur_prob={asked.gaussian_blur_prob} needs images of 12 pixels or more, as "
                        f"timm's blur is 23 wide: set it to 0, or raise model.img_size.")
    if asked.crop_scale is None:
        name = "bicubic" if asked.interpolation == "random" else asked.interpolation
        cut = CentreCrop(size, asked.crop_pct, name)
    else:
        cut = RandomCrop(size, _range(asked, "crop_scale"), _range(asked, "crop_ratio"), asked.interpolation)
    flips = [flip(p=p) for flip, p in ((RandomHorizontalFlip, asked.hflip), (RandomVerticalFlip, asked.vflip)) if p > 0]
    erasing = RandomErasing(asked.random_erasing, mode=asked.erasing_mode, max_count=asked.erasing_count, device="cpu")
    return Transform(size, cut, flips, _colour(size, asked), erasing if asked.random_erasing > 0 else None)


def _colour(size: tuple[int, int], asked: Recipe) -> list[Callable]:
    jitter = asked.color_jitter or None
    try:
        stages = transforms_imagenet_train(
            size, separate=True, interpolation=asked.interpolation, color_jitter=jitter, mean=asked.mean,
            auto_augment=asked.auto_augment, grayscale_prob=asked.grayscale_prob,
            gaussian_blur_prob=asked.gaussian_blur_prob)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"augment.auto_augment={asked.auto_augment} (such as rand-m9-mstd0.5-inc1) and "
                        f"augment.color_jitter={jitter} are not both what timm takes ({error}).") from error
    steps = list(stages[1].transforms)
    for step in steps:
        mend_posterize(step)
    return steps


def mend_posterize(step: Callable) -> None:
    """timm's increasing magnitudes reach 0 bits, which was a black image until PIL 13 made it an error."""
    policies = getattr(step, "policy", [])  # AutoAugment; RandAugment has ops
    for op in [*getattr(step, "ops", []), *(op for policy in policies for op in policy)]:
        if op.aug_fn is timm_posterize:
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options: object) -> Image.Image:
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return timm_posterize(image, bits_to_keep, **options)


def _pair(img_size: int | Sequence[int]) -> tuple[int, int]:
    return (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))


def _range(asked: Recipe, name: str) -> tuple[float, float]:
    values = getattr(asked, name)
    if len(values) != 2 or not 0 < values[0] <= values[1]:
        raise UserError(f"augment.{name}={list(values)} must be [smallest, largest], both above 0.")
    return float(values[0]), float(values[1])


def _check_one_of(setting: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"augment.{setting}={value} is none of {', '.join(choices)}.{did_you_mean(value, choices)}")
