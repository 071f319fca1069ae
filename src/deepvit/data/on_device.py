"""A small training set that lives on the training device as uint8, and is augmented there a micro-batch at a time.

The same crop gives the same bits as `transforms.py`, whatever the device; only the random numbers are others, hashed
for a whole micro-batch at once. They go to the device in one copy, which nobody waits for, and no shape depends on
them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepvit.data.decode import BadImage, AnyImage, as_array
from deepvit.data.draws import Draws
from deepvit.data.imageset import ImageSet
from deepvit.data.loader import Bad, Batch, grouped
from deepvit.data.randomness import Uniforms
from deepvit.data.stream import Draw, Stream, stable_hash
from deepvit.data.transforms import RandomCrop, Transform
from deepvit.errors import UserError

NOISE = 2**22  # places in the pool of normal values that erased pixels are read from


class OnDevice:
    """A training set with its augmentation on a device.

    Args:
        max_mb: most memory that the images may take.
    Raises:
        UserError: the transform changes colours, for which there is no batched form; a random crop of images of several
            sizes; more than `max_mb`.
    """

    def __init__(self, images: ImageSet, transform: Transform, *, seed: int, device: torch.device, max_mb: int):
        if transform.colour:
            raise UserError("augment.auto_augment, color_jitter, grayscale_prob and gaussian_blur_prob change one "
                            "image at a time, on the host: switch off what is on, or set data.on_device=false.")
        self.images, self.seed, self.device, self.size = images, seed, device, transform.size
        self.crop = transform.crop if isinstance(transform.crop, RandomCrop) else None
        self.refused = np.zeros(len(images), bool)  # PIL read what the fast decoder refused
        self.reasons: dict[int, str] = {}  # of the bad ones
        pixels = self._decode(None if self.crop else transform.crop, max_mb)
        good = np.setdiff1d(np.arange(len(images)), list(self.reasons))
        self.used = good[np.searchsorted(good, np.arange(len(images))) % len(good)]  # for a bad one the next good one
        self.pixels, self.targets = (torch.from_numpy(array).to(device) for array in (pixels, images.targets))
        self.draws = Draws(transform, pixels.shape[1:3])
        if self.crop:
            weights = [resize_weights(self.crop.names, *sides)
                       for sides in zip(pixels.shape[1:3], self.size, strict=True)]
            exact = None if device.type == "cpu" else torch.float64  # a GPU may multiply float32 as TF32
            self.down, self.across = (one.to(device, exact) for one in weights)
        if transform.erasing:
            generator = torch.Generator().manual_seed(stable_hash("noise", seed))
            self.noise = torch.randn(NOISE + 3 * self.size[0] * self.size[1], generator=generator).to(device)

    def train_batches(self, *, max_bad: int = 100, **places: int) -> Iterator[list[Batch]]:
        """As `loader.train_batches`."""
        stream = Stream(len(self.images), self.seed, **places)
        return grouped(map(self._batch, stream), stream.accumulation, max_bad)

    def _decode(self, crop: Callable[[AnyImage], AnyImage] | None, max_mb: int) -> np.ndarray:
        """uint8 [n, H, W, 3]; black for a bad image."""
        images, pixels = self.images, None
        for index in range(len(images)):
            before = images.refused
            try:
                image = images.image(index)
            except BadImage as bad:
                self.reasons[index] = str(bad)
                continue
            self.refused[index] = images.refused > before
            image = as_array(image if crop is None else crop(image))
            if pixels is None:
                pixels = _room(len(images), image.shape, max_mb)
            if image.shape != pixels.shape[1:]:
                raise UserError(f"{images.name(index)} has {image.shape[0]} x {image.shape[1]} pixels, others have "
                                f"{pixels.shape[1]} x {pixels.shape[2]}: a random crop on the device takes images of "
                                f"one size, so set data.on_device=false.")
            pixels[index] = image
        if pixels is None:
            raise UserError(f"None of the {len(images)} training images can be used; of the first: {self.reasons[0]}.")
        return pixels

    def _batch(self, draw: Draw) -> Batch:
        used = self.used[draw.indices]
        u = Uniforms(self.seed, draw.epochs, draw.indices, draw.repeats)
        crops, erasures = self.draws.crops(u), self.draws.erasures(u)  # [b, 6], [b, K, 4]
        columns = np.column_stack([used, crops, u.below(NOISE), erasures.reshape(len(used), -1)])
        used_there, *crops, noise, places = self._sent(columns).split([1] * 8 + [4 * erasures.shape[1]], dim=1)
        swapped = used != draw.indices
        bad = [Bad(asked, self.images.name(asked), self.reasons[asked], instead)
               for asked, instead in zip(draw.indices[swapped].tolist(), used[swapped].tolist(), strict=True)]
        return Batch(self._images(used_there, *crops), self.targets[used_there[:, 0]], torch.from_numpy(draw.indices),
                     torch.from_numpy(draw.positions), self._erasures(noise, places.unflatten(1, (-1, 4))), bad,
                     int(self.refused[used].sum()))

    def _sent(self, values: np.ndarray) -> Tensor:
        host = torch.from_numpy(values)
        return (host.pin_memory() if self.device.type == "cuda" else host).to(self.device, non_blocking=True)

    def _images(self, row: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, interpolation: Tensor,
                flips: Tensor) -> Tensor:
        """uint8 [b, 3, S, S], channels last in memory; all arguments [b, 1]."""
        whole = self.pixels.shape[1:3]
        y, x = _places(top, height, flips >= 2, whole[0]), _places(left, width, flips % 2 > 0, whole[1])
        places = ((row * whole[0] + y) * whole[1])[:, :, None] + x[:, None]  # [b, H, W], the crop first
        if self.crop is None:
            return self._read(places).permute(0, 3, 1, 2)
        across, down = (weights[interpolation[:, 0], side[:, 0] - 1]
                        for weights, side in ((self.across, width), (self.down, height)))  # [b, S, W], [b, S, H]
        images = _weighted(across, self._read(places.mT))  # [b, S, H, 3]
        return _weighted(down, images.transpose(1, 2)).byte().permute(0, 3, 1, 2)

    def _read(self, places: Tensor) -> Tensor:
        """Pixels at int64 [b, ...] of the whole set: uint8 [b, ..., 3]."""
        return self.pixels.view(-1, 3).index_select(0, places.flatten()).unflatten(0, places.shape)

    def _erasures(self, start: Tensor, places: Tensor) -> "Rectangles":
        """start: int64 [b, 1], where the noise of an image begins in the pool; places: [b, K, 4]."""
        rule, count = self.draws.erasing, places.shape[1]
        if rule is None:
            return Rectangles(places, start.new_empty(len(start), 0))
        if rule.per_pixel:
            values = self._noise(start, *self.size, 3).permute(0, 3, 1, 2)[:, None].expand(-1, count, -1, -1, -1)
        elif rule.rand_color:
            values = self._noise(start, count, 3, 1, 1)
        else:
            values = torch.zeros(len(start), count, 1, 1, 1, device=self.device)
        return Rectangles(places, values)

    def _noise(self, start: Tensor, *shape: int) -> Tensor:
        places = start + torch.arange(math.prod(shape), device=self.device)
        return self.noise.index_select(0, places.flatten()).view(-1, *shape)


@dataclass
class Rectangles:
    """Erasures of a batch, equally many for each image, some of them empty."""

    places: Tensor  # int64 [b, K, 4]: top, left, height, width
    values: Tensor  # float32 [b, K, ...], which broadcast to [b, K, 3, S, S]

    def of_rows(self, start: int, stop: int) -> "Rectangles":
        return Rectangles(self.places[start:stop], self.values[start:stop])

    def write(self, x: Tensor) -> Tensor:
        """Normalised images [b, 3, S, S] with the erasures."""
        y_axis, x_axis = (torch.arange(side, device=x.device) for side in x.shape[-2:])
        for place, values in zip(self.places.unbind(1), self.values.unbind(1), strict=True):
            top, left, height, width = place.split(1, dim=1)
            inside = ((y_axis >= top) & (y_axis < top + height))[:, None, :, None] \
                & ((x_axis >= left) & (x_axis < left + width))[:, None, None, :]  # [b, 1, S, S]
            x = torch.where(inside, values, x)
        return x


def _places(start: Tensor, length: Tensor, flipped: Tensor, whole: int) -> Tensor:
    """A crop's pixels along an axis in their order, int64 [b, whole]; those behind its end have no weight later."""
    steps = torch.arange(whole, device=start.device)
    return (start + torch.where(flipped, length - 1 - steps, steps)).clamp_(0, whole - 1)


def resize_weights(interpolations: Sequence[str], longest: int, size: int) -> Tensor:
    """What makes `size` pixels of 1, 2, ... `longest` ones: [interpolations, longest, size, longest].

    They are what ATen's resize makes of unit vectors, rounded as its kernel for uint8 rounds them: to as many bits
    behind the point as 16 bits of each allow. So their sums with pixels are exact, in any order: float32 where its 24
    bits hold them (unless images shrink to less than half), else float64.
    """
    table, most = torch.zeros(len(interpolations), longest, size, longest, dtype=torch.float64), 0.0
    for kind, mode in enumerate(interpolations):
        for length in range(1, longest + 1):
            units = torch.eye(length, dtype=torch.float64)[None, None]
            weights = F.interpolate(units, size=(size, length), mode=mode, antialias=True)[0, 0]  # [size, length]
            scale = 2.0 ** next((bits for bits in range(22) if weights.max() * 2**(bits + 1) + 0.5 >= 2**15), 22)
            weights = (weights * scale + weights.sign() / 2).trunc()
            most = max(most, 255 * float(weights.abs().sum(1).max()))
            table[kind, length - 1, :, :length] = weights / scale
    return table.float() if most < 2**24 else table


def _weighted(weights: Tensor, pixels: Tensor) -> Tensor:
    """[b, S, L] and [b, L, ...] -> whole numbers 0 .. 255 of the weights' type, [b, S, ...]."""
    made = torch.bmm(weights, pixels.flatten(2).to(weights.dtype)).add_(0.5).floor_().clamp_(0, 255)
    return made.unflatten(2, pixels.shape[2:])


def _room(count: int, shape: tuple[int, ...], max_mb: int) -> np.ndarray:
    room = np.zeros((count, *shape), np.uint8)  # takes no memory before it is written to
    if room.nbytes > max_mb * 2**20:
        raise UserError(f"The {count:,} training images take {room.nbytes / 2**20:.0f} MB, more than "
                        f"data.in_memory_mb={max_mb}: raise it, or set data.on_device=false.")
    return room
