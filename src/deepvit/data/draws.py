"""Where the samples of a batch are cropped, flipped and erased: drawn as by `transforms.py`, for all of them at once.

The rules are timm's: the same uniform numbers give the same rectangles.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torchvision.transforms import RandomHorizontalFlip, RandomVerticalFlip

from deepvit.data.randomness import Uniforms, generators_kept
from deepvit.data.transforms import RandomCrop, Transform

TRIES = 10  # timm's, for a rectangle that fits


class Draws:
    """The random parts of a transform, but for colour.

    Args:
        whole: (height, width) of the images before the crop.
    """

    def __init__(self, transform: Transform, whole: tuple[int, int]):
        self.whole, self.size, self.erasing = whole, transform.size, transform.erasing
        self.crop = transform.crop if isinstance(transform.crop, RandomCrop) else None
        self.flips = [sum(flip.p for flip in transform.flips if isinstance(flip, kind))
                      for kind in (RandomHorizontalFlip, RandomVerticalFlip)]
        self.fallback = self.crop and self._fallback()

    def crops(self, u: Uniforms) -> np.ndarray:
        """int64 [b, 6]: top, left, height, width, number of the interpolation, flips (1: left-right, 2: up-down)."""
        columns = [0, 0, *self.whole, 0] if self.crop is None else [*self._boxes(u), u.below(len(self.crop.names))]
        across, down = (u.take() < chance for chance in self.flips)
        return np.stack(np.broadcast_arrays(*columns, across + 2 * down), axis=1)

    def erasures(self, u: Uniforms) -> np.ndarray:
        """int64 [b, K, 4]: top, left, height, width in the cropped image; 0 high where fewer than K are drawn."""
        rule, (rows, columns) = self.erasing, self.size
        if rule is None:
            return np.zeros((len(u), 0, 4), np.int64)
        chosen, count = u.take() <= rule.probability, rule.min_count + u.below(rule.max_count - rule.min_count + 1)
        places = []
        for number in range(rule.max_count):
            (height, width), fits = _first_fit(u, (rule.min_area, rule.max_area), rule.log_aspect_ratio,
                                               rows * columns / count[:, None], (rows - 1, columns - 1))
            place = np.stack([u.below(rows - height + 1), u.below(columns - width + 1), height, width], axis=1)
            places.append(place * (chosen & fits & (number < count))[:, None])
        return np.stack(places, axis=1)

    def _boxes(self, u: Uniforms) -> np.ndarray:
        """[4, b]: top, left, height, width; at least one pixel of an image of few."""
        rows, columns = self.whole
        (width, height), fits = _first_fit(u, self.crop.scale, np.log(self.crop.ratio), rows * columns,
                                           (columns, rows))
        box = np.stack([u.below(rows - height + 1), u.below(columns - width + 1), height, width])
        top, left, height, width = np.where(fits, box, np.array(self.fallback)[:, None])
        return np.stack([np.minimum(top, rows - 1), np.minimum(left, columns - 1), np.maximum(height, 1),
                         np.maximum(width, 1)])

    def _fallback(self) -> tuple[int, int, int, int]:
        """timm's crop where none fits; none does that has nine times the area of the image."""
        with generators_kept():
            return self.crop.get_params(torch.empty(1).expand(1, *self.whole), (9, 9), self.crop.ratio)


def _first_fit(u: Uniforms, areas: tuple[float, float], log_aspects: Sequence[float], whole: np.ndarray | float,
               most: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Sides of the first rectangle drawn that fits into `most`, int64 [2, b], and whether one did, bool [b].

    They are sqrt(area * aspect) and sqrt(area / aspect), `areas` being parts of `whole`.
    """
    draws = u.take(TRIES, 2)
    area = (areas[0] + (areas[1] - areas[0]) * draws[..., 0]) * whole  # [b, TRIES]
    aspect = np.exp(log_aspects[0] + (log_aspects[1] - log_aspects[0]) * draws[..., 1])
    sides = np.rint(np.sqrt([area * aspect, area / aspect])).astype(np.int64)  # [2, b, TRIES]
    fits = (sides <= np.reshape(most, (2, 1, 1))).all(axis=0)
    return sides[:, np.arange(len(u)), fits.argmax(axis=1)], fits.any(axis=1)
