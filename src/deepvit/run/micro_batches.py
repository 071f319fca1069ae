"""How a device's share of the global batch is cut: which sizes are allowed, and the largest of them that fits."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch

from deepvit.config.settings import Settings
from deepvit.data.prepare import mixes
from deepvit.engine.device import Example, available_bytes, device_name, largest_batch, needed_bytes, sharing
from deepvit.engine.state import TrainState
from deepvit.engine.step import Stepper
from deepvit.errors import UserError
from deepvit.models import ViT


def norm_group(norm_batches: Collection[int | None]) -> int:
    """Images that the batch norms of a model (`ViT.norm_batches`) must see together; 1: as they come."""
    return math.lcm(*filter(None, norm_batches))


def unit(settings: Settings, norm_batches: Collection[int | None]) -> int:
    """Images that no micro-batch may split: a group of the batch norms, a pair of mixup or cutmix."""
    group = min(norm_group(norm_batches), settings.data.batch_size)
    return math.lcm(group, 2 if mixes(settings.augment) else 1)


def _norm_batch(settings: Settings) -> str:
    """As it is typed: a stem of batch norms may stand beside an attention whose file has no norm."""
    return "+" * ("norm_batch" not in settings.model["attention"]) + "model.attention.norm_batch"


def allowed(settings: Settings, norm_batches: Collection[int | None], world: int) -> list[int]:
    """Images that a device may take at once, largest first: parts of its share of the global batch in whole `unit`s.
    With None among `norm_batches` the size decides the statistics, so `auto` is the whole share. UserError where the
    global batch does not divide over the devices, or a device's share not into whole units."""
    batch, most, whole = settings.data.batch_size, settings.engine.device_batch, unit(settings, norm_batches)
    share, rest = divmod(batch, world)
    if rest:
        raise UserError(f"data.batch_size={batch} does not divide among {world} devices: give a multiple of {world}.")
    group, pair = norm_group(norm_batches), 2 if mixes(settings.augment) else 1
    why = " and ".join([f"norm_batch={group} takes batch statistics over so many"] * (group > 1)
                       + ["mixup and cutmix pair neighbours"] * (pair > 1))
    sizes = [share // parts for parts in range(1, share // whole + 1) if share % (parts * whole) == 0]
    if not sizes:
        fitting = [size for size in range(min(group, share), 1, -1) if share % math.lcm(size, pair) == 0]
        other = f", or {_norm_batch(settings)}={fitting[0]}" if group > 1 and fitting else ""
        multiple = math.lcm(group, pair)
        raise UserError(f"data.batch_size={batch} ({share} per device) is not a multiple of {multiple} ({why}): give a "
                        f"multiple of {world * multiple}{other}.")
    if most is None or most == "auto" and None in norm_batches:
        return sizes[:1]
    if most == "auto":
        return sizes
    if most != (nearest := min(max(most, whole), share)):
        raise UserError(f"engine.device_batch={most} is not from {whole}{why and f' ({why})'} to {share}, a device's "
                        f"share of the global batch: give {nearest} or auto.")
    return [size for size in sizes if size <= most]


def choose(settings: Settings, state: TrainState, stepper: Stepper, begun: Mapping[str, Any] | None) -> tuple[int, str]:
    """The size of this run's micro-batches, and in words the memory that they take where that was measured. On devices
    like those of `begun`, the content of the checkpoint that is resumed, a run keeps its size, and so its bits."""
    ranks = stepper.ranks
    sizes = allowed(settings, state.model.norm_batches, ranks.world)
    if len(sizes) == 1 or settings.engine.device_batch != "auto":
        return sizes[0], ""
    if begun and begun.get("device") == device_name(ranks.device) and begun.get("micro_batch") in sizes:
        return begun["micro_batch"], ""
    fitting, words = largest_batch(sizes, state, stepper, _example(state.model, ranks.device), sharing())
    return -ranks.max(-fitting), words


def advice(settings: Settings, state: TrainState, stepper: Stepper, count: int) -> str:
    """What helps where `count` images at once are too many: what they need, what there is, the settings, best first."""
    network, device = state.model, stepper.ranks.device
    if stepper.masks is not None:
        stepper.masks.forget()  # those of the images that did not fit

    def needed(checkpointing: bool) -> str:
        network.set_grad_checkpointing(checkpointing)
        fixed, each = needed_bytes(state, stepper, _example(network, device))
        return f"{(fixed + count * each) / 2**30:.3g} GiB"

    ways = [] if settings.engine.grad_checkpointing else [f"engine.grad_checkpointing=true ({needed(True)})"]
    ways += ["precision=bf16"] * (stepper.precision.dtype is None)
    ways += [f"a smaller {_norm_batch(settings)}"] * (count > 1)
    there = available_bytes(device, sharing()) / 2**30
    needs = needed(settings.engine.grad_checkpointing)
    return f"they need {needs} and {there:.3g} GiB are there; set {' or '.join(ways) or 'a smaller model'}"


def _example(network: ViT, device: torch.device) -> Example:
    return lambda count: (torch.zeros(count, network.in_chans, *network.img_size, device=device),
                          torch.zeros(count, dtype=torch.int64, device=device))
