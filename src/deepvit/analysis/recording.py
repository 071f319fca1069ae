"""Attention maps of an unmodified model: forward pre-hooks record the inputs of its attention modules in eval mode, and
the maps are computed from these afterwards, one block at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import get_args

import timm.layers
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from timm.utils import unwrap_model
from torch import Tensor, nn

from deepvit import ops
from deepvit.engine.evaluate import modes_kept
from deepvit.errors import UserError
from deepvit.models.attention import Attention, Stage

MAPS_BYTES = 32 * 2**20  # float32 maps of one block: bounds what any measure needs beside its result
HELD_BYTES = 256 * 2**20  # float32 maps of all blocks, kept while they are compared
BRANCHES = {"attention": "drop_path1", "mlp": "drop_path2"}  # branch -> the module of a block that returns it


def rms(x: Tensor) -> Tensor:
    """Root mean square of each image's tokens, `[B, N, D]` -> `[B]`."""
    return x.float().square().mean((1, 2)).sqrt()


def _plain_maps(q: Tensor, k: Tensor, scale: float, stage: Stage) -> Tensor:
    return scale * q @ k.mT if stage == "logits" else ops.softmax_maps(q, k, scale)


def _timm_maps(module: nn.Module, x: Tensor, stage: Stage) -> Tensor:
    B, N, _ = x.shape
    q, k, _ = module.qkv(x).view(B, N, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
    return _plain_maps(module.q_norm(q), module.k_norm(k), module.scale, stage)


def _parallel_maps(module: nn.Module, x: Tensor, stage: Stage) -> Tensor:
    B, N, _ = x.shape
    _, q, k, _ = module.in_proj(module.in_norm(x)).split(module.in_split, dim=-1)
    q, k = (part.view(B, N, module.num_heads, -1) for part in (q, k))
    return _plain_maps(module.q_norm(q).transpose(1, 2), module.k_norm(k).transpose(1, 2), module.scale, stage)


# By their `forward`: a subclass that overrides it may compute something else, so it is not read as its parent.
READERS: dict[Callable, Callable[[nn.Module, Tensor, Stage], Tensor]] = {
    timm.layers.Attention.forward: _timm_maps, ParallelScalingBlock.forward: _parallel_maps}


def _reader(module: nn.Module) -> Callable[[nn.Module, Tensor, Stage], Tensor] | None:
    """What computes a module's maps `[B, H, N, N]` from its input; None if nothing does."""
    return type(module).weights if isinstance(module, Attention) else READERS.get(type(module).forward)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no autocast."""
    device = next((p.device.type for p in module.parameters()), "cpu")
    with modes_kept(module), torch.no_grad(), torch.autocast(device, enabled=False):
        module.eval()
        yield


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose maps can be read, in the order of definition. Raises UserError if there is none."""
    model = unwrap_model(model)
    found = [module for module in model.modules() if _reader(module)]
    if not found:
        raise UserError(f"{type(model).__name__} has no attention that can be read: give a deepvit model or a timm "
                        f"VisionTransformer.")
    return found


class Maps(Sequence[Tensor]):
    """The maps of all blocks, each computed when asked for: `maps[i]` is `[B, H, N, N]`, float32, rows queries."""

    def __init__(self, modules: Sequence[nn.Module], inputs: Sequence[Tensor], stage: Stage):
        self.modules, self.inputs, self.stage = modules, inputs, stage

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, block: int) -> Tensor:
        module = self.modules[block]
        source = self.modules.index(getattr(module, "source", module))  # the leader's input where maps are shared
        with frozen(module):
            return _reader(module)(module, self.inputs[source], self.stage).float()


class Recording:
    """What one pass of images fed the attention modules and blocks: `[B, N, D]` each, in the order of the calls.

    `modules`, `inputs`: the attention modules and what entered them; `tokens`: the input of the first of `model.blocks`
    and the output of each (empty without `blocks`); `branches`: of each block the RMS `[B]` of `attention` and `mlp` as
    they are added (empty without `drop_path1`, `drop_path2`); `logits`: the model's output."""

    def __init__(self):
        self.modules: list[nn.Module] = []
        self.inputs: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.branches: list[dict[str, Tensor]] = []
        self.logits: Tensor | None = None

    def __len__(self) -> int:
        """The number of images."""
        return len(self.inputs[0])

    def maps(self, stage: Stage = "final") -> Maps:
        """The maps at a stage, computed block by block as they are read."""
        if stage not in get_args(Stage):
            raise UserError(f"stage='{stage}' is not known: choose from {', '.join(get_args(Stage))}.")
        return Maps(self.modules, self.inputs, stage)

    def _take_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.modules.append(module)
        self.inputs.append((args[0] if args else kwargs["x"]).detach())

    @contextmanager
    def of_blocks(self, model: nn.Module) -> Iterator[None]:
        """Inside, a forward pass leaves its tokens, with their graph where there is one, and branches here."""
        with ExitStack() as hooks:
            for block in getattr(model, "blocks", ()):
                hooks.enter_context(block.register_forward_hook(self._take_block))
                self.branches.append({})
                for branch, name in BRANCHES.items():
                    if isinstance(module := getattr(block, name, None), nn.Module):
                        take = partial(self._take_branch, self.branches[-1], branch)
                        hooks.enter_context(module.register_forward_hook(take))
            yield

    def _take_block(self, block: nn.Module, args: tuple, output: Tensor) -> None:
        self.tokens += [output] if self.tokens else [args[0], output]

    def _take_branch(self, branches: dict[str, Tensor], name: str, module: nn.Module, args: tuple, output: Tensor
                     ) -> None:
        branches[name] = rms(output.detach())


def record(model: nn.Module, x: Tensor) -> Recording:
    """One forward pass of images `[B, C, height, width]` in eval mode, its attention inputs and tokens kept; the model
    and random state stay as they were. Raises UserError if the model has no attention that can be read."""
    model = unwrap_model(model)
    recording, modules = Recording(), attention_modules(model)
    parameter = next(model.parameters())
    with ExitStack() as hooks, frozen(model), recording.of_blocks(model):
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(recording._take_input, with_kwargs=True))
        recording.logits = model(x.detach().to(parameter.device, parameter.dtype))
    return recording


def recordings(model: nn.Module, x: Tensor, batch_size: int | None = None, *, all_blocks: bool = False
               ) -> Iterator[Recording]:
    """`record` for `batch_size` images at a time; by default as many as keep the maps of a block within 32 MiB, or with
    `all_blocks` those of all blocks within 256 MiB."""
    if not len(x):
        raise UserError("There are no images to look at: give at least one.")
    if batch_size is None:
        maps = record(model, x[:1]).maps()
        limit = HELD_BYTES // len(maps) if all_blocks else MAPS_BYTES
        batch_size = max(1, limit // (4 * maps[0].numel()))
    for chunk in x.split(batch_size):
        yield record(model, chunk)


def attention_maps(model: nn.Module, x: Tensor, stage: Stage = "final", *,
                   batch_size: int | None = None) -> list[Tensor]:
    """The attention maps of every block of an unmodified model, `[B, H, N, N]` float32 on its device, rows queries.

    `model`: a deepvit model, or anything built of `timm.layers.Attention`, such as timm's VisionTransformer; `x`:
    images `[B, C, height, width]`, normalised as it expects. `stage`: "final" maps multiply v, "softmax" ones are not
    mixed yet, "logits" are q k^T as the softmax sees it. Final maps of re-attention may be negative and their rows need
    not sum to one. `batch_size`: images per forward pass, by default as many as keep a block's maps within 32 MiB. The
    result takes `4 B L H N^2` bytes; `record(model, x).maps()` gives one block at a time. Raises UserError if the model
    has no attention, or the images are not of its size."""
    result: list[Tensor] = []
    start = 0
    for recording in recordings(model, x, batch_size):
        for i, maps in enumerate(recording.maps(stage)):
            if start == 0:
                result.append(maps.new_empty(len(x), *maps.shape[1:]))
            result[i][start:start + len(maps)] = maps
        start += len(maps)
    return result
