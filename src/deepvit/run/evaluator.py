"""Evaluation of one set of images, in training and afterwards, and its calibration: batch statistics of N training
images beside those of training (`calibrate=N`)."""

from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from deepvit import data as inputs
from deepvit.config.settings import Data, Settings
from deepvit.engine.calibrate import calibrate
from deepvit.engine.evaluate import Evaluation, evaluate
from deepvit.engine.progress import Display
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.engine.step import Precision, Prepare
from deepvit.errors import UserError
from deepvit.models import ViT
from deepvit.run import build
from deepvit.run.micro_batches import norm_group

AUTO = 512  # images that are enough: docs/results/calibration.md
UNGROUPED = 256  # images at once where a norm has no group of its own: the published code's calibration


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on `images`, on all ranks together; None where a rank was asked to stop.

    `calibration` makes the batches of training images whose statistics batch norms take first (see `calibration`; None:
    they keep their own). The model keeps the new ones, so that a checkpoint has what was evaluated; asked to stop, it
    keeps the old. `among`: indices of classes to choose among for `Evaluation.correct_present`.
    """

    data: Data
    images: inputs.ImageSet
    prepare: Prepare
    ranks: Ranks
    precision: Precision
    stop: StopRequest
    calibration: Callable[[], Iterator[inputs.Batch]] | None
    among: Tensor | None = None

    def __call__(self, model: nn.Module, display: Display | None = None, title: str = "evaluate") -> Evaluation | None:
        with nullcontext(display) if display else Display(self.ranks.is_main) as shown:
            before = self._evaluate(model, shown, title)
            if before is None or self.calibration is None:
                return before
            buffers = list(model.buffers())
            kept = [buffer.clone() for buffer in buffers]
            is_calibrated = calibrate(model, self.calibration(), self.prepare, self.ranks, self.precision,
                                      self._should_stop)
            after = self._evaluate(model, shown, title) if is_calibrated else None
        if after is None:
            with torch.no_grad():
                torch._foreach_copy_(buffers, kept)
            return None
        return replace(after, uncalibrated=before)

    @cached_property
    def _batches(self) -> Callable[[], Iterator[inputs.Batch]]:
        return build.eval_batches(self.data, self.images, self.ranks)

    def _evaluate(self, model: nn.Module, display: Display, title: str) -> Evaluation | None:
        bar = display.bar(title, len(self.images))
        evaluation = evaluate(model, self._batches(), self.prepare, self.ranks, self.precision, n=len(self.images),
                              among=self.among, advance=bar.advance, should_stop=self._should_stop)
        bar.close()
        return evaluation

    def _should_stop(self) -> bool:
        return self.ranks.any_asked_to_stop(bool(self.stop))


def calibration(count: int, data: Data, train: inputs.ImageSet | None, norm_batches: Collection[int | None],
                ranks: Ranks) -> Callable[[], Iterator[inputs.Batch]] | None:
    """Makes this rank's share of `count` training images (0: None), as evaluation sees them: the same shuffled ones
    every time, in whole groups of `norm_batches` (`ViT.norm_batches`). UserError for fewer images than one group."""
    if not count:
        return None
    group = norm_group(norm_batches)
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


def images_to_calibrate(settings: Settings, model: ViT, in_training_set: int) -> int:
    """`settings.calibrate`; `auto` is `AUTO` images, or as many as there are in whole groups, for averaged weights of a
    model with batch statistics, and none for others."""
    if settings.calibrate != "auto":
        return settings.calibrate
    if not (settings.ema.decay and model.norm_batches):
        return 0
    group = norm_group(model.norm_batches)
    return min(max(AUTO, group), in_training_set // group * group)
