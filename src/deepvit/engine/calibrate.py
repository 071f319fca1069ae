"""Batch statistics taken anew from training images, for weights that no statistics were gathered with: an average."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deepvit.engine.ranks import Ranks
from deepvit.engine.step import Precision, Prepare


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any], prepare: Prepare, ranks: Ranks, precision: Precision,
              should_stop: Callable[[], bool] = lambda: False) -> bool:
    """Sets each BatchNorm's running statistics to their mean over the images of all ranks' `batches`.

    The cumulative average of `torch.optim.swa_utils.update_bn`, but of the network as it is evaluated: dropout and
    stochastic depth are off, so the result is the same on any number of ranks. Momenta and modes are as before.

    Args:
        batches: this rank's (perhaps none), each of whole groups of images that share their statistics.
        should_stop: asked before each batch; if any rank says yes, nothing is changed and False is returned.
    Raises:
        UserError, Failure: what any rank's `batches` raised, on all ranks.
    """
    norms = tracking_norms(model)
    statistics = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
    if not statistics:
        return True
    before = _flat(statistics)
    total, seen = torch.zeros_like(before), before.new_zeros(1)

    def take(batch: Any) -> None:
        x, _ = prepare(batch, 0, ranks.device, training=False)
        with precision.autocast(ranks.device):
            model(x)
        total.add_(_flat(statistics) * len(batch))
        seen.add_(len(batch))

    with statistics_of_the_batch(model):
        try:
            complete = ranks.for_each(batches, take, should_stop)
        finally:
            _write(before, statistics)
    if not complete:
        return False
    sums = ranks.sum(torch.cat([total, seen]).cpu())
    _write((sums[:-1] / sums[-1]).to(before.device), statistics)
    return True


def tracking_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


@contextmanager
def statistics_of_the_batch(model: nn.Module) -> Iterator[None]:
    """Inside, a forward pass leaves its batch's own statistics in each BatchNorm; all else is in eval mode."""
    norms = tracking_norms(model)
    training = {module: module.training for module in model.modules()}
    kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def _flat(statistics: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in statistics]).double()


def _write(flat: Tensor, statistics: list[Tensor]) -> None:
    for tensor, part in zip(statistics, flat.split([tensor.numel() for tensor in statistics]), strict=True):
        tensor.copy_(part.view_as(tensor))
