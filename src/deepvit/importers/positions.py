"""Position embeddings: the grid that a file's rows stand for, and other image sizes, each dialect by its own rule."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from deepvit.errors import Untold, UserError

Grid = tuple[int, int]  # rows, columns of patches
Resize = Callable[[Tensor, Grid, Grid], Tensor]


def grid_of(img_size: int | Sequence[int], patch_size: int | Sequence[int]) -> Grid:
    """Rows and columns of patches in an image, sizes in pixels, each one number or (height, width)."""
    (height, width), (rows, columns) = pair(img_size), pair(patch_size)
    return height // rows, width // columns


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels, from one number or two."""
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise UserError(f"img_size={size!r} is no image size: give one number of pixels, or [height, width].")
    return sides


def native_grid(count: int, own: Grid | None, asked: Grid, square_only: bool, source: str) -> Grid | None:
    """The grid of a file's `count` patch positions; None where nothing tells.

    Args:
        own: the grid by the file's own image size, where it tells one.
        asked: the grid of the model that is wanted.
        square_only: the dialect knows square images only.
    Raises:
        UserError: the positions may be a square's or the wanted model's, and nothing tells which.
    """
    side = math.isqrt(max(count, 0))
    square = (side, side) if side and side * side == count else None
    if own and math.prod(own) == count:
        return own
    if square_only or math.prod(asked) != count:
        return square
    if square and square != asked:
        raise Untold(f"{source} has {count} patch positions and does not tell whether they are {side}x{side} or "
                     f"{asked[0]}x{asked[1]}: give grid_size=[rows, columns] of the file.")
    return asked


def bicubic(pos: Tensor, old: Grid, new: Grid) -> Tensor:
    """timm's rule: antialiased bicubic, class row kept. pos `[1, 1 + old rows * columns, D]` -> `[1, 1 + new, D]`."""
    return resample_abs_pos_embed(pos, new_size=list(new), old_size=list(old), num_prefix_tokens=1)


def google(pos: Tensor, old: Grid, new: Grid) -> Tensor:
    """Google's rule and ViT-pytorch's, `scipy.ndimage.zoom(order=1)`: bilinear between aligned corners.

    Where scipy's rounding leaves its last row and column at zero (35 pairs of sides up to 32 and 48, such as 16 -> 30)
    this refuses: zeros are no embedding, and anything else would not be Google's model.
    """
    for before, after in zip(old, new, strict=True):
        if zoom_leaves_zeros(before, after):
            raise UserError(f"Google's rule for {old[0]}x{old[1]} -> {new[0]}x{new[1]} patches leaves position "
                            f"embeddings at zero (a rounding in scipy's zoom): choose another img_size.")
    grid = pos[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2).float()  # [1, D, rows, columns]
    grid = F.interpolate(grid, new, mode="bilinear", align_corners=True)
    return torch.cat([pos[:, :1].float(), grid.flatten(2).mT], dim=1)


def zoom_leaves_zeros(old: int, new: int) -> bool:
    """Whether scipy's zoom samples its last point outside the grid: `(new - 1) * ((old - 1) / (new - 1)) > old - 1`."""
    return new > 1 and (new - 1) * ((old - 1) / (new - 1)) > old - 1


def first_rows(pos: Tensor, old: Grid, new: Grid) -> Tensor:
    """The rule of DeepViT-flax and vit-pytorch: a smaller image takes the first rows, a larger one has none."""
    tokens = 1 + new[0] * new[1]
    if tokens > pos.shape[1]:
        raise UserError(f"The weights know {pos.shape[1] - 1} positions, the model needs {tokens - 1}: this dialect "
                        f"takes the first rows and has none for larger images; choose a smaller img_size.")
    return pos[:, :tokens]
