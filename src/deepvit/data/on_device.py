"""A small training set that lives on the training device as uint8, and is augmented there a micro-batch at a time. The
same crop gives the same bits as `transforms.py`. The random numbers differ: they are hashed for a whole micro-batch at
once. One copy takes them to the device, and no shape depends on them, so the host never waits."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import RandomHorizontalFlip, RandomVerticalFlip

from deepvit.data.decode import AnyImage, BadImage, as_array
from deepvit.data.imageset import ImageSet
from deepvit.data.loader import Bad, Batch, grouped
from deepvit.data.stream import Draw, Stream, generators_kept, stable_hash
from deepvit.data.transforms import RandomCrop, Transform
from deepvit.errors import UserError

NOISE = 2**22  # places in the pool of normal values that erased pixels are read from
TRIES = 10  # timm's, for a rectangle that fits


class Uniforms:
    """Numbers in [0, 1) for b samples, by SplitMix64 (Steele et al., OOPSLA 2014) from the seed and their words."""

    STEP = np.uint64(0x9E3779B97F4A7C15)

    def __init__(self, seed: int, *words: np.ndarray):
        self.states = np.full(len(words[0]), stable_hash("sample", seed), np.uint64)  # [b]
        for word in words:
            self.states = self._mixed(self.states + word.astype(np.uint64) * self.STEP)
        self._taken = 0

    def take(self, *shape: int) -> np.ndarray:
        """float64 [b, *shape]."""
        count = math.prod(shape)
        numbers = np.arange(self._taken + 1, self._taken + count + 1, dtype=np.uint64)
        self._taken += count
        bits = self._mixed(self.states[:, None] + numbers * self.STEP)  # [b, count]
        return ((bits >> np.uint64(11)) * 2.0**-53).reshape(-1, *shape)

    def below(self, end: np.ndarray | int) -> np.ndarray:
        """Whole numbers 0 .. end - 1, int64 [b]."""
        return (self.take() * end).astype(np.int64)

    @staticmethod
    def _mixed(bits: np.ndarray) -> np.ndarray:
        bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return bits ^ bits >> np.uint64(31)


class Draws:
    """Where the samples of a batch are cropped, flipped and erased, from images of (height, width) `whole`."""

    def __init__(self, transform: Transform, whole: tuple[int, int]):
        self.whole, self.size, self.erasing = whole, transform.size, transform.erasing
        self.crop = transform.crop if isinstance(transform.crop, RandomCrop) else None
        self.flips = [sum(flip.p for flip in transform.flips if isinstance(flip, kind))
                      for kind in (RandomHorizontalFlip, RandomVerticalFlip)]
        if self.crop:
            with generators_kept():  # timm's crop where none fits: none does that has nine times the area of the image
                self.fallback = self.crop.get_params(torch.empty(1).expand(1, *whole), (9, 9), self.crop.ratio)

    def crops(self, u: Uniforms) -> np.ndarray:
        """int64 [b, 6]: top, left, height, width, number of the interpolation, flips (1: left-right, 2: up-down)."""
        rows, columns = self.whole
        drawn = [0, 0, rows, columns, 0]
        if self.crop:
            ratio, area = np.log(self.crop.ratio), rows * columns
            (width, height), fits = _first_fit(u, self.crop.scale, ratio, area, (columns, rows))
            box = np.stack([u.below(rows - height + 1), u.below(columns - width + 1), height, width])
            top, left, height, width = np.where(fits, box, np.array(self.fallback)[:, None])
            drawn = [np.minimum(top, rows - 1), np.minimum(left, columns - 1), np.maximum(height, 1),
                     np.maximum(width, 1), u.below(len(self.crop.names))]  # of a tiny image one pixel at least
        across, down = (u.take() < chance for chance in self.flips)
        return np.stack(np.broadcast_arrays(*drawn, across + 2 * down), axis=1)

    def erasures(self, u: Uniforms) -> np.ndarray:
        """int64 [b, K, 4]: top, left, height, width in the cropped image; 0 high where fewer than K are drawn."""
        rule, (rows, columns) = self.erasing, self.size
        if rule is None:
            return np.zeros((len(u.states), 0, 4), np.int64)
        chosen, count = u.take() <= rule.probability, rule.min_count + u.below(rule.max_count - rule.min_count + 1)
        places = []
        for number in range(rule.max_count):
            (height, width), fits = _first_fit(u, (rule.min_area, rule.max_area), rule.log_aspect_ratio,
                                               rows * columns / count[:, None], (rows - 1, columns - 1))
            place = np.stack([u.below(rows - height + 1), u.below(columns - width + 1), height, width], axis=1)
            places.append(place * (chosen & fits & (number < count))[:, None])
        return np.stack(places, axis=1)


def _first_fit(u: Uniforms, areas: tuple[float, float], log_aspects: Sequence[float], whole: np.ndarray | float,
               most: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Sides of the first rectangle, `areas` of `whole`, that fits into `most`, int64 [2, b]; whether one did, [b]."""
    draws = u.take(TRIES, 2)
    area = (areas[0] + (areas[1] - areas[0]) * draws[..., 0]) * whole  # [b, TRIES]
    aspect = np.exp(log_aspects[0] + (log_aspects[1] - log_aspects[0]) * draws[..., 1])
    sides = np.rint(np.sqrt([area * aspect, area / aspect])).astype(np.int64)  # [2, b, TRIES]
    fits = (sides <= np.reshape(most, (2, 1, 1))).all(axis=0)
    return sides[:, np.arange(len(draws)), fits.argmax(axis=1)], fits.any(axis=1)


class OnDevice:
    """A training set with its augmentation on a device. Raises UserError for images that take more than `max_mb`, for a
    transform that changes colours (which has no batched form), and for a random crop of images of several sizes."""

    def __init__(self, images: ImageSet, transform: Transform, *, seed: int, device: torch.device, max_mb: int):
        if transform.colour:
            raise UserError("Colours cannot change on the device (augment.auto_augment, color_jitter, grayscale_prob, "
                            "gaussian_blur_prob): switch off what is on, or set data.on_device=false.")
        self.images, self.seed, self.device, self.size = images, seed, device, transform.size
        self.by_pil = np.zeros(len(images), bool)  # since the fast decoder refused it
        self.reasons: dict[int, str] = {}  # of the bad ones
        pixels = self._decode(None if isinstance(transform.crop, RandomCrop) else transform.crop, max_mb)
        good = np.setdiff1d(np.arange(len(images)), list(self.reasons))
        self.used = good[np.searchsorted(good, np.arange(len(images))) % len(good)]  # for a bad one the next good one
        self.pixels = torch.from_numpy(pixels).to(device)
        self.targets = torch.from_numpy(images.targets.copy()).to(device)  # a copy, as the index is mapped read-only
        self.draws = Draws(transform, pixels.shape[1:3])
        if self.draws.crop:
            exact = None if device.type == "cpu" else torch.float64  # a GPU may multiply float32 as TF32
            self.down = resize_weights(self.draws.crop.names, pixels.shape[1], self.size[0]).to(device, exact)
            self.across = resize_weights(self.draws.crop.names, pixels.shape[2], self.size[1]).to(device, exact)
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
            before = images.pil_fallbacks
            try:
                image = images.image(index)
            except BadImage as bad:
                self.reasons[index] = str(bad)
                continue
            self.by_pil[index] = images.pil_fallbacks > before
            image = as_array(crop(image) if crop else image)
            if pixels is None:
                pixels = np.zeros((len(images), *image.shape), np.uint8)  # takes no memory before it is written to
                if pixels.nbytes > max_mb * 2**20:
                    raise UserError(f"The {len(images):,} training images take {pixels.nbytes / 2**20:.0f} MB, more "
                                    f"than data.in_memory_mb={max_mb}: raise it, or set data.on_device=false.")
            if image.shape != pixels.shape[1:]:
                raise UserError(f"{images.name(index)} has {image.shape[0]} x {image.shape[1]} pixels, others have "
                                f"{pixels.shape[1]} x {pixels.shape[2]}: set data.on_device=false.")
            pixels[index] = image
        if pixels is None:
            raise UserError(f"None of the {len(images)} training images can be used; of the first: {self.reasons[0]}.")
        return pixels

    def _batch(self, draw: Draw) -> Batch:
        used = self.used[draw.indices]
        u = Uniforms(self.seed, draw.epochs, draw.indices, draw.repeats)
        crops, erasures = self.draws.crops(u), self.draws.erasures(u)  # [b, 6], [b, K, 4]
        host = torch.from_numpy(np.column_stack([used, crops, u.below(NOISE), erasures.reshape(len(used), -1)]))
        sent = (host.pin_memory() if self.device.type == "cuda" else host).to(self.device, non_blocking=True)
        used_there, *crops, noise, places = sent.split([1] * 8 + [4 * erasures.shape[1]], dim=1)
        swapped = used != draw.indices
        bad = [Bad(asked, self.images.name(asked), self.reasons[asked], instead)
               for asked, instead in zip(draw.indices[swapped].tolist(), used[swapped].tolist(), strict=True)]
        return Batch(self._images(used_there, *crops), self.targets[used_there[:, 0]], torch.from_numpy(draw.indices),
                     self._erasures(noise, places.unflatten(1, (-1, 4))), bad, int(self.by_pil[used].sum()))

    def _images(self, row: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, interpolation: Tensor,
                flips: Tensor) -> Tensor:
        """uint8 [b, 3, S, S], channels last in memory; all arguments [b, 1]."""
        whole = self.pixels.shape[1:3]
        y, x = _places(top, height, flips >= 2, whole[0]), _places(left, width, flips % 2 > 0, whole[1])
        places = ((row * whole[0] + y) * whole[1])[:, :, None] + x[:, None]  # [b, H, W], the crop first
        if self.draws.crop is None:
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
        if rule and rule.per_pixel:
            values = self._noise(start, *self.size, 3).permute(0, 3, 1, 2)[:, None].expand(-1, count, -1, -1, -1)
        elif rule and rule.rand_color:
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
    """A crop's pixels along an axis in their order, int64 [b, whole]; those past its end get no weight later."""
    steps = torch.arange(whole, device=start.device)
    return (start + torch.where(flipped, length - 1 - steps, steps)).clamp_(0, whole - 1)


def resize_weights(interpolations: Sequence[str], longest: int, size: int) -> Tensor:
    """What makes `size` pixels of 1, 2, ... `longest` ones: [interpolations, longest, size, longest]. ATen's resize of
    unit vectors, rounded as its uint8 kernel does, to as many binary places as 16 bits allow. So sums with pixels are
    exact in any order: in float32 where its 24 bits hold them, else (images shrunk below half) float64."""
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
