"""How a device's share of the global batch is cut: which sizes are allowed, and the largest of them that fits."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from deepvit.config.settings import Augment, Settings
from deepvit.engine.device import device_name
from deepvit.engine.memory import largest_batch
from deepvit.engine.state import TrainState
from deepvit.engine.step import Stepper
from deepvit.errors import UserError


def unit(settings: Settings) -> int:
    """Images that no micro-batch may part: a group of the head norm, a pair of mixup or cutmix."""
    return math.lcm(min(norm_group(settings.model) or 1, settings.data.batch_size), 2 if mixes(settings.augment) else 1)


def mixes(augment: Augment) -> bool:
    return augment.mix_prob > 0 and (augment.mixup > 0 or augment.cutmix > 0)


def allowed(settings: Settings, world: int) -> list[int]:
    """Images that a device may take at once, largest first: parts of its share of the global batch in whole `unit`s.

    Raises:
        UserError: the global batch does not divide over the devices, or a device's share not into whole units.
    """
    batch, most, whole = settings.data.batch_size, settings.engine.device_batch, unit(settings)
    if batch % world:
        raise UserError(f"data.batch_size={batch} (of all devices together) does not divide over {world} devices.")
    share = batch // world
    if share % whole:
        raise UserError(f"data.batch_size={batch} leaves each of {world} devices {share} images, which is no multiple "
                        f"of {whole}: {_why(settings)}. Choose a multiple of {world * whole}.")
    sizes = [share // parts for parts in range(1, share // whole + 1) if share % (parts * whole) == 0]
    if most is None or (most == "auto" and _depends_on_size(settings)):
        return sizes[:1]
    if most == "auto":
        return sizes
    if most > share:
        raise UserError(f"engine.device_batch={most} is more than a device's share of the global batch, {share} "
                        f"images: give {share} or less, or auto.")
    if most < sizes[-1]:
        raise UserError(f"engine.device_batch={most} is less than the {whole} images that cannot be parted: "
                        f"{_why(settings)}.")
    return [size for size in sizes if size <= most]


def choose(settings: Settings, in_chans: int, state: TrainState, stepper: Stepper,
           begun: Mapping[str, Any] | None = None) -> tuple[int, str]:
    """The size of this run's micro-batches, and in words what they take of the memory where that was measured.

    Args:
        begun: content of the checkpoint that is continued: on devices like its own it keeps its size, and so its bits.
    Raises:
        UserError: as `allowed`.
    """
    ranks, sizes = stepper.ranks, allowed(settings, stepper.ranks.world)
    if len(sizes) == 1 or settings.engine.device_batch != "auto":
        return sizes[0], ""
    before = begun or {}
    if before.get("device") == device_name(ranks.device) and before.get("micro_batch") in sizes:
        return before["micro_batch"], ""
    size = settings.data.img_size
    shape = (in_chans, size, size) if isinstance(size, int) else (in_chans, *size)

    def example(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.zeros(count, *shape, device=ranks.device),
                torch.zeros(count, dtype=torch.int64, device=ranks.device))

    fitting, words = largest_batch(sizes, state, stepper, example)
    return -ranks.max(-fitting), words


def norm_group(model: Mapping[str, Any]) -> int | None:
    """Images that the batch statistics of a model of these settings are taken over: the head norm's, or the convolution
    stem's own. None: as many as come."""
    given = [part.get("norm_batch") for part in (model["attention"], model.get("stem")) if isinstance(part, Mapping)]
    return math.lcm(*filter(None, given)) if any(given) else None


def _depends_on_size(settings: Settings) -> bool:
    """Whether batch statistics are those of whatever a device takes at once, so that its size is no free choice."""
    stem = settings.model.get("stem")
    has_norm = settings.model["attention"].get("norm") or "conv" in (stem, isinstance(stem, Mapping) and stem["name"])
    return bool(has_norm) and norm_group(settings.model) is None


def _why(settings: Settings) -> str:
    group = norm_group(settings.model)
    reasons = [f"model.attention.norm_batch={group} takes its statistics over so many"] * bool(group) + [
        "mixup and cutmix pair neighbours"] * mixes(settings.augment)
    return " and ".join(reasons)
