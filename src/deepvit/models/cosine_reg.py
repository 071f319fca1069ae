"""The published regularisation between the maps of neighbouring blocks, as a loss of which the loop knows nothing.

What it needs are maps with gradients from a training pass. No block hands maps on: the inputs of the attention modules
are recorded, and the modules asked for their maps.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepvit.errors import UserError
from deepvit.models.attention import Attention


def cosine_regularisation(maps: Sequence[Tensor], pairs: int, factor: float = 0.1) -> Tensor:
    """The term that the published code adds to the loss: `factor * sum_{i < pairs} mean(cos(A_i, A_{i+1})) / pairs`.

    The cosine is taken over the *head* axis at every entry of the maps, and of the first pairs of blocks, as
    `loss/cross_entropy.py` there has it (its `cos_reg_component` is `pairs`, its factor 0.1; eps 1e-8). The paper's
    own similarity is per head and token instead.

    Args:
        maps: final maps `[B, H, N, N]` of the first `pairs + 1` blocks or more.
    Raises:
        UserError: fewer blocks than that.
    """
    if not 1 <= pairs < len(maps):
        raise UserError(f"The cosine regularisation of {pairs} pairs needs the maps of {pairs + 1} blocks, and there "
                        f"are {len(maps)}: give 1 to {max(1, len(maps) - 1)} pairs.")
    cosines = [F.cosine_similarity(maps[i], maps[i + 1], dim=1, eps=1e-8).mean() for i in range(pairs)]
    return factor * torch.stack(cosines).sum() / pairs


class MapRecorder:
    """Hooks that keep the inputs of the first attention modules while `model` itself is called, and nothing else:
    a recomputation by gradient checkpointing, which calls only blocks, goes unseen.

    `maps()` gives the final maps of the latest call in training mode, with gradients and by the statistics of that
    batch; no running statistics move. Dropout on the maps is left out.
    """

    def __init__(self, model: nn.Module, first: int):
        self.modules = [module for module in model.modules() if isinstance(module, Attention)][:first]
        if len(self.modules) < first:
            raise UserError(f"The maps of {first} blocks are wanted, and the model has {len(self.modules)}: "
                            f"ask for fewer.")
        self._inputs: list[Tensor] = []
        self._open = False
        self._handles = [model.register_forward_pre_hook(self._begin),
                         model.register_forward_hook(self._end, always_call=True),
                         *(module.register_forward_pre_hook(self._keep) for module in self.modules)]

    def maps(self) -> list[Tensor]:
        """`[B, H, N, N]` for each of the first blocks; empty if the latest call was no training pass."""
        return [module.weights(x) for module, x in zip(self.modules, self._inputs)]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, model: nn.Module, args: tuple) -> None:
        self._inputs, self._open = [], model.training and torch.is_grad_enabled()

    def _keep(self, module: nn.Module, args: tuple) -> None:
        if self._open:
            self._inputs.append(args[0])

    def _end(self, model: nn.Module, args: tuple, output: Tensor) -> None:
        self._open = False


@contextmanager
def record_maps(model: nn.Module, first: int) -> Iterator[list[Tensor]]:
    """`with record_maps(model, first=4) as maps: logits = model(x)`: afterwards `maps` holds the final maps
    `[B, H, N, N]` of the first 4 blocks, with gradients (see `MapRecorder`)."""
    recorder, maps = MapRecorder(model, first), []
    try:
        yield maps
        maps += recorder.maps()
    finally:
        recorder.remove()


class CosineRegularised:
    """A criterion with the published regularisation added: `criterion(logits, target) + cosine_regularisation(maps)`.

    Args:
        criterion: `(logits, target) -> loss`.
        model: the one that made the logits, unwrapped or inside DistributedDataParallel; its hooks stay.
        pairs, factor: see `cosine_regularisation`.
    """

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor], model: nn.Module, pairs: int,
                 factor: float = 0.1):
        self.criterion, self.pairs, self.factor = criterion, pairs, factor
        self.recorder = MapRecorder(model, pairs + 1)

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        loss, maps = self.criterion(logits, target), self.recorder.maps()
        return loss + cosine_regularisation(maps, self.pairs, self.factor) if maps else loss
