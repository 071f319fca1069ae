"""timm's optimizers by their settings, each of which must have its effect."""

from dataclasses import replace

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
    """By timm's factory: no decay on biases, norms and the embeddings that the model names; a layer-wise decay gives
    each group its `lr_scale`. UserError where timm has no such optimizer, or it does not take these settings, each of
    which it must know: timm drops some that it does not."""
    if chosen.opt not in list_optimizers():
        raise UserError(f"optimizer.opt={chosen.opt} is not one of timm's."
                        f"{did_you_mean(chosen.opt, list_optimizers())}")
    info = get_optimizer_info(chosen.opt)
    given = {name: value for name in ("momentum", "betas", "eps") if (value := getattr(chosen, name)) is not None}
    for name, value in given.items():
        if not getattr(info, f"has_{name}"):
            raise UserError(f"optimizer.{name}={value} has no effect with optimizer.opt={chosen.opt}: set it to null.")
    if "betas" in given and len(chosen.betas) != info.num_betas:
        raise UserError(f"optimizer.betas={chosen.betas} must be a list of {info.num_betas}.")
    further = dict(chosen.kwargs or {})
    for name in OWN & further.keys():
        raise UserError(f"optimizer.kwargs.{name} is a setting of its own: give optimizer.{name}.")
    fused = {"fused": True} if chosen.opt in FUSED else {}
    try:
        check_arguments(get_optimizer_class(chosen.opt, bind_defaults=False), further, "optimizer.kwargs",
                        ignore_missing={"params", *OWN})
        return create_optimizer_v2(network, chosen.opt, lr=chosen.lr, weight_decay=chosen.weight_decay,
                                   layer_decay=chosen.layer_decay, **given, **fused | further)
    except REFUSALS as error:
        raise _refused(chosen, error) from error


def try_out(chosen: Optimizer, device: torch.device) -> None:
    """Makes a step: some optimizers refuse their settings, or gradients without a graph, only then (UserError)."""
    network = nn.Linear(1, 1, device=device)
    made = optimizer(network, replace(chosen, layer_decay=None))  # one layer has none
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    try:
        made.step()
    except REFUSALS as error:
        raise _refused(chosen, error) from error


def _refused(chosen: Optimizer, error: Exception) -> UserError:
    further = f" with optimizer.kwargs={dict(chosen.kwargs)}" if chosen.kwargs else ""
    return UserError(f"optimizer.opt={chosen.opt} does not work here{further}: {error}.")
