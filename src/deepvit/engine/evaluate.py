"""Exact evaluation: every image once on any number of ranks, integer counts, one division at the end."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import bdtr, ndtri
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parameters_to_vector

from deepvit.engine.ranks import Ranks, views_like
from deepvit.engine.step import Precision, Prepare, is_out_of_memory
from deepvit.errors import Failure


@dataclass
class Evaluation:
    """Counts over a data set, and what was predicted for each image in its order."""

    n: int
    correct1: int
    correct5: int
    loss: float  # mean cross-entropy, nats
    seconds: float
    bad: list[Any] = field(default_factory=list)  # images that could not be read, counted wrong
    targets: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # [n]
    predictions: np.ndarray = field(default_factory=lambda: np.empty((0, 5), np.int64))  # [n, 5], best first
    confidences: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))  # [n], of the best
    classes: int = 1000  # that the model chooses among
    correct_present: int | None = None  # where it chooses among the classes that the set has images of
    uncalibrated: "Evaluation | None" = None  # of the same weights with the statistics that training left

    top1 = property(lambda self: 100 * self.correct1 / self.n)

    @property
    def correct(self) -> np.ndarray:
        """bool `[n]`: whether the best guess is right."""
        return self.predictions[:, 0] == self.targets

    def summary(self) -> dict[str, Any]:
        """Percentages, loss, 95 % interval of top-1 and rate, as plain JSON."""
        low, high = wilson_interval(self.correct1, self.n)
        before = self.uncalibrated
        return {**({} if before is None else {"uncalibrated_top1": before.top1, "uncalibrated_loss": before.loss}),
                **({"top5": 100 * self.correct5 / self.n} if self.classes > 5 else {}),  # else always right
                **({} if self.correct_present is None else {"present_top1": 100 * self.correct_present / self.n}),
                "top1": self.top1, "loss": self.loss, "n": self.n,
                "top1_low": 100 * low, "top1_high": 100 * high, "bad_pictures": len(self.bad),
                "eval_images_per_s": self.n / max(self.seconds, 1e-9)}


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Any], prepare: Prepare, ranks: Ranks, precision: Precision, *,
             n: int, among: Tensor | None = None, should_stop: Callable[[], bool] = lambda: False,
             advance: Callable[[int], None] = lambda images: None) -> Evaluation | None:
    """Top-1, top-5 and mean cross-entropy over the `batches` of all ranks, which must hold each of `n` images once, or
    Failure is raised. `among`: classes to choose among for `correct_present`. `advance` is called with the number of
    images done. `should_stop`, which makes it None, and what else is raised: see `Ranks.for_each`."""
    start, parts, bad = time.perf_counter(), [], []

    def take(batch: Any) -> None:
        parts.extend(scores(model, batch, prepare, ranks, precision, batch.bad, among))
        bad.extend(batch.bad)
        advance(len(batch) * ranks.world)

    with modes_kept(model):
        model.eval()
        complete = ranks.for_each(batches, take, should_stop)
    return _gather(parts, bad, ranks, n, time.perf_counter() - start) if complete else None


def scores(model: nn.Module, batch: Any, prepare: Prepare, ranks: Ranks, precision: Precision, bad: list[Any],
           among: Tensor | None = None) -> list[dict[str, Tensor]]:
    """What a batch came to, as a whole or, where that does not fit into memory, in halves."""
    try:
        return [_score(model, batch, prepare, ranks, precision, bad, among)]
    except RuntimeError as error:
        if not is_out_of_memory(error) or len(batch) == 1:
            raise
    torch.cuda.empty_cache()  # of nothing on a CPU
    return [score for half in batch.split((len(batch) + 1) // 2)
            for score in scores(model, half, prepare, ranks, precision, bad, among)]


def _score(model: nn.Module, batch: Any, prepare: Prepare, ranks: Ranks, precision: Precision, bad: list[Any],
           among: Tensor | None) -> dict[str, Tensor]:
    x, y = prepare(batch, 0, ranks.device, training=False)
    with precision.autocast(ranks.device):
        logits = model(x)  # [b, C]
    logits = logits.float()
    best = logits.topk(min(5, logits.shape[-1])).indices  # [b, 5]; of probabilities, the small ones would be ties
    confidences = logits.softmax(-1).gather(1, best[:, :1])[:, 0]  # [b]
    unusable = ~torch.isfinite(logits).all(-1)
    if bad:
        unusable |= torch.isin(batch.indices, torch.tensor([one.index for one in bad])).to(y.device)
    best = best.masked_fill(unusable[:, None], -1)  # never right
    present = {} if among is None else {"present": (among[logits[:, among].argmax(-1)] == y) & ~unusable}
    # They stay on the device: fetching them here would make it wait for each batch.
    return {"indices": batch.indices, "targets": y, "predictions": best, "confidences": confidences, **present,
            "losses": F.cross_entropy(logits, y, reduction="none"), "classes": torch.full_like(y, logits.shape[-1])}


def _gather(parts: list[dict[str, Tensor]], bad: list[Any], ranks: Ranks, n: int, seconds: float) -> Evaluation:
    mine = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]} if parts else {}
    shares = [share for share in ranks.gather((mine, bad)) if share[0]]
    whole = {name: np.concatenate([share[name] for share, _ in shares]) for name in shares[0][0]}
    indices = whole["indices"]
    if not np.array_equal(np.sort(indices), np.arange(n)):
        raise Failure(f"The evaluation saw {len(indices)} images, {len(np.unique(indices))} different ones, of {n}.")
    whole = {name: values[np.argsort(indices)] for name, values in whole.items()}
    hits = whole["predictions"] == whole["targets"][:, None]  # [n, 5]
    return Evaluation(n, int(hits[:, 0].sum()), int(hits.any(1).sum()), float(whole["losses"].mean(dtype=float)),
                      seconds, [one for _, some in shares for one in some], whole["targets"], whole["predictions"],
                      whole["confidences"], int(whole["classes"][0]),
                      int(whole["present"].sum()) if "present" in whole else None)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any], prepare: Prepare, ranks: Ranks, precision: Precision,
              should_stop: Callable[[], bool] = lambda: False) -> bool:
    """Sets each BatchNorm's running statistics to their mean over the training images of all ranks' `batches`, whole
    groups of images that share their statistics. As torch's `update_bn`, but of the network as it is evaluated, without
    dropout and stochastic depth, so the same on any number of ranks. False, and no change, if asked to stop."""
    statistics = [tensor for norm in _tracking_norms(model) for tensor in (norm.running_mean, norm.running_var)]
    if not statistics:
        return True
    before = parameters_to_vector(statistics).double()
    total, seen = torch.zeros_like(before), before.new_zeros(1)

    def take(batch: Any) -> None:
        x, _ = prepare(batch, 0, ranks.device, training=False)
        with precision.autocast(ranks.device):
            model(x)
        total.add_(parameters_to_vector(statistics).double() * len(batch))
        seen.add_(len(batch))

    with statistics_of_the_batch(model):
        try:
            complete = ranks.for_each(batches, take, should_stop)
        finally:
            torch._foreach_copy_(statistics, views_like(statistics, before))
    if complete:
        sums = sum(ranks.gather(torch.cat([total, seen]).cpu()))
        torch._foreach_copy_(statistics, views_like(statistics, (sums[:-1] / sums[-1]).to(before.device)))
    return complete


def _tracking_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards every submodule's training flag is what it was."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def statistics_of_the_batch(model: nn.Module) -> Iterator[None]:
    """Inside, a forward pass leaves its batch's own statistics in each BatchNorm; all else is in eval mode."""
    norms = _tracking_norms(model)
    kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    with modes_kept(model):
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        try:
            yield
        finally:
            for norm, (momentum, count) in zip(norms, kept, strict=True):
                norm.momentum = momentum
                norm.num_batches_tracked.copy_(count)


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion, both ends in 0..1. E. B. Wilson, JASA 22, 1927."""
    p, z = correct / n, float(ndtri(0.975))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(first_correct: np.ndarray, second_correct: np.ndarray) -> dict[str, float]:
    """Exact two-sided McNemar test between two models on the same images (Q. McNemar, Psychometrika 12, 1947). From
    bool `[n]`: how many only the first and only the second got right, and the p value of "equally good"."""
    first = int((first_correct & ~second_correct).sum())
    second = int((second_correct & ~first_correct).sum())
    p = min(1.0, 2 * float(bdtr(min(first, second), first + second, 0.5)))  # a fair coin as lopsided as this, or more
    return {"only_first": first, "only_second": second, "p": p}
