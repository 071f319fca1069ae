"""What is measured while a model trains: its accuracy, and its attention on a fixed batch."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from deepvit import analysis
from deepvit.analysis.draw_depth import draw_probe
from deepvit.analysis.probe import without_matrices
from deepvit.engine.evaluate import Evaluation, evaluate
from deepvit.engine.fit import Measures
from deepvit.engine.progress import Display
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.run import build
from deepvit.run.build import Built
from deepvit.run.calibration import calibration, images_to_calibrate


def evaluator(built: Built, stop: StopRequest) -> Callable[[nn.Module, Display], Evaluation | None]:
    """`(model, display) -> Evaluation` of the validation set, calibrated if asked for; None: a rank was asked to stop.

    Raises:
        UserError: too few images to calibrate.
    """
    settings, ranks, images, precision = built.settings, built.ranks, built.splits.val, built.stepper.precision
    batches = build.eval_batches(settings.data, images, ranks)
    count = images_to_calibrate(settings, built.model, len(built.splits.train))
    calibrated = calibration(count, settings.data, built.splits.train, built.model.norm_batches, built.prepare, ranks,
                             precision, stop)

    def run(model: nn.Module, display: Display) -> Evaluation | None:
        def once() -> Evaluation | None:
            bar = display.bar("evaluate", len(images))
            result = evaluate(model, batches(), built.prepare, ranks, precision, n=len(images), advance=bar.advance,
                              should_stop=lambda: ranks.any_asked_to_stop(bool(stop)))
            bar.close()
            return result

        return calibrated(model, once)

    return run


def attention_metrics(built: Built) -> Callable[[nn.Module, int], Measures] | None:
    """Measures of the attention on a fixed batch: the first images of each class in turn, as evaluation sees them."""
    settings, ranks, images = built.settings, built.ranks, built.splits.val
    wanted = min(settings.probe.images, len(images))
    if not wanted or not ranks.is_main:
        return None
    chosen = images.take(_spread(images.targets, wanted))
    batches = build.eval_batches(settings.data, chosen, Ranks(0, 1, ranks.device))

    def measure(model: nn.Module, step: int) -> Measures:
        x = torch.cat([built.prepare(batch, 0, ranks.device, training=False)[0] for batch in batches()])
        if not step and not settings.init:
            model = analysis.with_statistics_of(model, x)  # an untrained norm has none yet
        values = analysis.probe(model, x, matrix=True)
        return without_matrices(values), partial(draw_probe, values)

    return measure


def _spread(targets: np.ndarray, wanted: int) -> np.ndarray:
    """Indices of `wanted` images, as many of each class as can be."""
    order = np.argsort(targets, kind="stable")
    turn = np.concatenate([np.arange(count) for count in np.unique(targets, return_counts=True)[1]])
    return np.sort(order[np.argsort(turn, kind="stable")][:wanted])
