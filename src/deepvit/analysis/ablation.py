"""A trained model with a part removed, for as long as it is evaluated: no training, no copy."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from deepvit.analysis.measures import head_mixes
from deepvit.errors import UserError

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "diagonal": lambda theta: theta.diagonal().diag(),
    "identity": lambda theta: torch.eye(len(theta)).to(theta)}


@contextmanager
def without_block(model: nn.Module, index: int) -> Iterator[None]:
    """Inside, block `index` returns the tokens that enter it."""
    with unwrap_model(model).blocks[index].register_forward_hook(lambda block, args, output: args[0]):
        yield


@contextmanager
def with_theta(model: nn.Module, form: str) -> Iterator[None]:
    """Inside, every Theta is its `diagonal` or the `identity`; its bias and the norm behind it stay, whose statistics
    are those of the whole Theta unless they are calibrated inside."""
    weights = [mix.weight for mix in head_mixes(model) if mix]
    kept = [weight.data for weight in weights]
    for weight in weights:
        weight.data = FORMS[form](weight.data)
    try:
        yield
    finally:
        for weight, value in zip(weights, kept, strict=True):
            weight.data = value


def ablations(model: nn.Module, what: str) -> dict[str, AbstractContextManager[None]]:
    """Name -> context in which `model` is so: for `blocks` each block left out in turn, for `theta` both forms of it.
    Raises UserError for another word, or a model without Theta."""
    if what == "blocks":
        return {f"without block {i}": without_block(model, i) for i in range(len(unwrap_model(model).blocks))}
    if what != "theta":
        raise UserError(f"ablate={what} is not known: give blocks, theta, or null for the whole model alone.")
    if not any(head_mixes(model)):
        raise UserError("ablate=theta needs a model that mixes heads, such as model/attention=reattention: leave it "
                        "out for this one.")
    return {f"theta {form}": with_theta(model, form) for form in FORMS}
