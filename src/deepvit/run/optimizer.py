"""timm's optimizers by their settings, each of which must have its effect."""

from dataclasses import replace
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from torch import nn

from deepvit.config.settings import Optimizer
from deepvit.config.signature import check_arguments
from deepvit.errors import UserError, did_you_mean

FUSED = ("adam", "adamw", "momentum", "sgd")  # torch's own, which update all parameters in one kernel
OWN = {"lr", "weight_decay", "momentum", "betas", "eps"}  # keywords that are settings by themselves
REFUSALS = AssertionError, ImportError, RuntimeError, TypeError, ValueError  # what they raise over their arguments


def optimizer(network: nn.Module, chosen: Optimizer) -> torch.optim.Optimizer:
    """By timm's factory: no decay on biases, norms and the embeddings that the model names.

    A layer-wise decay gives each group its `lr_scale`.

    Raises:
        UserError: timm has no such optimizer, or that one does not take these settings.
    """
    if chosen.opt not in list_optimizers():
        raise UserError(f"optimizer.opt={chosen.opt} is not one of timm's."
                        f"{did_you_mean(chosen.opt, list_optimizers())}")
    try:
        return create_optimizer_v2(network, chosen.opt, lr=chosen.lr, weight_decay=chosen.weight_decay,
                                   layer_decay=chosen.layer_decay, **_keywords(chosen))
    except REFUSALS as error:
        raise _refused(chosen, error) from error


def _refused(chosen: Optimizer, error: Exception) -> UserError:
    further = f" with optimizer.kwargs={dict(chosen.kwargs)}" if chosen.kwargs else ""
    return UserError(f"optimizer.opt={chosen.opt} does not work here{further}: {error}.")


def try_out(chosen: Optimizer, device: torch.device) -> None:
    """Makes a step: some optimizers refuse their settings, or gradients without a graph, only then.

    Raises:
        UserError: as `optimizer`.
    """
    network = nn.Linear(1, 1, device=device)
    made = optimizer(network, replace(chosen, layer_decay=None))  # one layer has none
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    try:
        made.step()
    except REFUSALS as error:
        raise _refused(chosen, error) from error


def _keywords(chosen: Optimizer) -> dict[str, Any]:
    """The keywords that are given, each of which the optimizer must take: timm drops some that it does not."""
    info, cls = get_optimizer_info(chosen.opt), get_optimizer_class(chosen.opt, bind_defaults=False)
    given = {name: value for name in ("momentum", "betas", "eps") if (value := getattr(chosen, name)) is not None}
    for name in given:
        if not getattr(info, f"has_{name}"):
            raise UserError(f"optimizer.{name}={given[name]} has no effect with optimizer.opt={chosen.opt}: set it to "
                            f"null.")
    if "betas" in given and len(chosen.betas) != info.num_betas:
        raise UserError(f"optimizer.betas={chosen.betas} must be a list of {info.num_betas}.")
    further = dict(chosen.kwargs or {})
    for name in OWN & further.keys():
        raise UserError(f"optimizer.kwargs.{name} is a setting of its own: give optimizer.{name}.")
    check_arguments(cls, further, "optimizer.kwargs", ignore_missing={"params", *OWN})
    return given | ({"fused": True} if chosen.opt in FUSED else {}) | further
