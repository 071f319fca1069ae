"""What a trained model still gets right without one of its parts: `eval ablate=blocks | theta`."""

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from deepvit.analysis.ablation import ablations
from deepvit.engine.evaluate import Evaluation, mcnemar
from deepvit.report.render import printed

log = logging.getLogger(__name__)


def ablate(model: nn.Module, what: str, whole: Evaluation, evaluate: Callable[[], Evaluation | None]
           ) -> list[dict[str, Any]] | None:
    """Evaluates `model` without each of its parts in turn, and prints one table.

    Args:
        what: see `analysis.ablation.ablations`.
        whole: the evaluation of the model as it is, on the same images.
        evaluate: that of the model as it is then; None: it was asked to stop.
    Returns:
        for each form `form`, `top1`, `loss` and McNemar's test against the whole model; None if it was asked to stop.
    """
    found = []
    for form, inside in ablations(model, what).items():
        with inside:
            evaluation = evaluate()
        if evaluation is None:
            return None
        found.append({"form": form, "top1": evaluation.top1, "loss": evaluation.loss,
                      **mcnemar(whole.correct, evaluation.correct)})
    rows = [[one["form"], f"{one['top1']:.2f}", f"{one['top1'] - whole.top1:+.2f}", f"{one['loss']:.4f}",
             str(one["only_first"]), str(one["only_second"]), f"{one['p']:.3g}"] for one in found]
    log.info("\n%s", printed(["form", "top-1 %", "difference", "loss", "only whole right", "only this right",
                              "McNemar p"], rows, markdown=True))
    return found
