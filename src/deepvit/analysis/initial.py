"""The same model before training: what similarity is there by construction."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from deepvit.analysis.probe import probe
from deepvit.analysis.recording import BRANCHES, unwrap
from deepvit.engine.evaluate import statistics_of_the_batch
from deepvit.errors import UserError
from deepvit.models.registry import build_model


def at_initialisation(model: nn.Module, seed: int = 0, images: Tensor | None = None) -> nn.Module:
    """A freshly initialised model of the same settings, in eval mode; random state is left alone.

    Args:
        model: a model of deepvit (its `config` says how to build it).
        seed: of the initialisation.
        images: `[B, C, height, width]`, to which the norms' running statistics are set, as the first training step
            sees them. Without images they are 0 and 1, and an untrained norm over heads does not yet centre the maps:
            each head is near a constant, and M near +1 or -1 by its sign. With images M is near 0. Neither has
            anything to do with learning.
    Raises:
        UserError: the model has no `config`.
    """
    model = unwrap(model)
    if getattr(model, "config", None) is None:
        raise UserError(f"{type(model).__name__} does not say how it was built: only deepvit models can be looked at "
                        f"at initialisation.")
    parameter = next(model.parameters())
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        fresh = build_model(model.config).to(parameter.device).eval()
    return fresh if images is None else with_statistics_of(fresh, images)


@torch.no_grad()
def with_statistics_of(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy of `model` in eval mode whose running statistics are those of `images`; random state is left alone.

    What a norm computes in the first training steps, before its running statistics mean anything.
    """
    model = deepcopy(unwrap(model))
    with statistics_of_the_batch(model):
        model(images)
    return model.eval()


def regime(model: nn.Module, images: Tensor) -> dict[str, list[float]]:
    """Where an untrained model stands: how far its maps are from uniform, and how loud its branches are.

    Args:
        model: anything with `blocks` of one attention each, in the residual form of `models.blocks.Block`.
        images: `[B, C, height, width]`, from which the norms take their statistics, as in the first training step.
    Returns:
        lists with an entry per block, in the order of a table's columns: `spread` (N std(A)), `gain` (of the final maps
        over the softmax maps), `attention` and `mlp` (RMS of the branch over that of the stream): see `measures`.
    """
    found = probe(with_statistics_of(model, images), images)
    branches = found["branch_over_stream"]
    return {"spread": found["spread"], "gain": found["gain"], **{name: branches[name] for name in BRANCHES}}
