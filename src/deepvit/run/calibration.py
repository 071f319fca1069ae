"""`calibrate=N`: evaluation with batch statistics of N training images, beside that with the statistics of training."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import torch
from torch import nn

from deepvit import data as inputs
from deepvit.config.settings import Data, Settings
from deepvit.engine.evaluate import Evaluation, calibrate
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.engine.step import Precision, Prepare
from deepvit.errors import UserError
from deepvit.models import ViT
from deepvit.run import build
from deepvit.run.micro_batches import norm_group

AUTO = 512  # images that are enough: docs/results/calibration.md
UNGROUPED = 256  # images at once where a norm has no group of its own: the published code's calibration

Once = Callable[[], Evaluation | None]  # an evaluation; None: it was asked to stop


def calibration(count: int, data: Data, train: inputs.ImageSet | None, norm_batches: Collection[int | None],
                prepare: Prepare, ranks: Ranks, precision: Precision, stop: StopRequest
                ) -> Callable[[nn.Module, Once], Evaluation | None]:
    """`(model, once) -> Evaluation`, which calls `once`, calibrates the model and calls `once` again.

    The model keeps its new statistics, so that a checkpoint has what was evaluated; asked to stop, it keeps the old.

    Args:
        count: training images, as evaluation sees them; 0: `once` alone.
        norm_batches: the model's (`ViT.norm_batches`).
    Raises:
        UserError: fewer images than one group of the head norm.
    """
    batches = _batches(count, data, train, norm_group(norm_batches), ranks) if count else None

    def run(model: nn.Module, once: Once) -> Evaluation | None:
        first = once()
        if first is None or batches is None:
            return first
        buffers = list(model.buffers())
        before = [buffer.clone() for buffer in buffers]
        asked = calibrate(model, batches(), prepare, ranks, precision, lambda: ranks.any_asked_to_stop(bool(stop)))
        second = once() if asked else None
        if second is None:
            with torch.no_grad():
                torch._foreach_copy_(buffers, before)
            return None
        return replace(second, uncalibrated=first)

    return run


def images_to_calibrate(settings: Settings, model: ViT, in_training_set: int) -> int:
    """`settings.calibrate`, or what it is where it is left open: `AUTO` images, as many as there are in whole groups,
    for averaged weights of a model with batch statistics; none for others."""
    if settings.calibrate != "auto":
        return settings.calibrate
    if not (settings.ema.decay and model.norm_batches):
        return 0
    group = norm_group(model.norm_batches)
    return min(max(AUTO, group), in_training_set // group * group)


def _batches(count: int, data: Data, train: inputs.ImageSet, group: int, ranks: Ranks
             ) -> Callable[[], Iterator[inputs.Batch]]:
    """The same shuffled images every time, in whole groups, of which each rank has its share."""
    size = group if group > 1 else min(UNGROUPED, count)
    groups = min(count, len(train)) // size
    if not groups:
        raise UserError(f"calibrate={count} gives fewer images than norm_batch={size}, over which the "
                        f"norm takes its statistics ({len(train):,} are in the training set): give a multiple of it.")
    first, end = (groups * part // ranks.world for part in (ranks.rank, ranks.rank + 1))

    def batches() -> Iterator[inputs.Batch]:
        steps = inputs.train_batches(train, build.eval_transform(data), seed=0, batch_size=size, start_step=first,
                                       steps=end, workers=min(data.workers, end - first), max_bad=data.max_bad,
                                       pin=ranks.device.type == "cuda")
        for (batch,) in steps:
            yield batch

    return batches
