"""The published regularisation between the maps of neighbouring blocks, from a training pass with gradients. No block
passes maps on: hooks record the inputs of the attention modules, which are asked for their maps afterwards, outside of
any checkpointed region."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepvit.errors import UserError
from deepvit.models.attention import Attention


def cosine_regularisation(maps: Sequence[Tensor], pairs: int) -> Tensor:
    """`sum_{i < pairs} mean(cos(A_i, A_{i+1})) / pairs` of the final maps `[B, H, N, N]` of the first `pairs + 1`
    blocks or more; the published code adds 0.1 times this to the loss.

    The cosine is taken over the *head* axis at every entry of the maps, as in its `loss/cross_entropy.py` (where
    `pairs` is `cos_reg_component`; eps 1e-8). The paper's own similarity is per head and token instead.
    """
    if not 1 <= pairs < len(maps):
        raise UserError(f"The cosine regularisation of {pairs} pairs needs the maps of {pairs + 1} blocks, and there "
                        f"are {len(maps)}: give 1 to {max(1, len(maps) - 1)} pairs.")
    cosines = [F.cosine_similarity(maps[i], maps[i + 1], dim=1, eps=1e-8).mean() for i in range(pairs)]
    return torch.stack(cosines).sum() / pairs


@contextmanager
def record_maps(model: nn.Module, first: int) -> Iterator[list[Tensor]]:
    """`with record_maps(model, first=4) as maps: logits = model(x)`: afterwards `maps` holds the final maps
    `[B, H, N, N]` of the first 4 blocks, float32, with gradients, in training mode by the statistics of this batch. No
    running statistics move, and dropout on the maps is left out. `model` may be inside DistributedDataParallel.
    """
    modules = [module for module in model.modules() if isinstance(module, Attention)][:first]
    if len(modules) < first:
        raise UserError(f"The maps of {first} blocks are wanted, and the model has {len(modules)}: ask for fewer.")
    inputs: dict[nn.Module, Tensor] = {}
    maps: list[Tensor] = []
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(lambda at, args: inputs.update({at: args[0]})))
        yield maps
    with torch.autocast(next(model.parameters()).device.type, enabled=False):  # bf16 loses near-uniform maps
        maps += [module.weights(inputs[module.source].float()) for module in modules]
