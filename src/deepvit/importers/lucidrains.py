"""Re-implementations of DeepViT that project flattened patches: lucidrains/vit-pytorch's `vit_pytorch.deepvit.DeepViT`,
in three generations of names, and its port conceptofmind/DeepViT-flax, a parameter tree in .npz or flax's msgpack."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deepvit.errors import Untold, UserError
from deepvit.importers.dialect import TRANSPOSE, Dialect, Row, Rule, Source, both, flax_dense, flax_norm
from deepvit.importers.files import WeightsFile
from deepvit.importers.settings import Grid
from deepvit.models import attention_config


def _patch_sizes(file: WeightsFile, patch_dim: int, given: Mapping[str, Any]) -> tuple[int, int]:
    """(channels, side) of a flattened square patch: by in_chans or patch_size where given, else by an img_size that
    just fits the file's positions, else 3 channels, or 1 or 4 if only one of them makes a square."""
    sides = [side for side in range(1, math.isqrt(patch_dim) + 1) if patch_dim % side**2 == 0]
    readings = [(patch_dim // side**2, side) for side in sides]
    if given.get("in_chans"):
        found = [one for one in readings if one[0] == given["in_chans"]]
    elif given.get("patch_size"):
        found = [one for one in readings if _is_square(given["patch_size"], one[1])]
    else:
        found = ([one for one in readings if _fits(given.get("img_size"), file, one[1])]
                 or [one for one in readings if one[0] == 3] or [one for one in readings if one[0] in (1, 4)])
    if len(found) == 1:
        return found[0]
    known = " or ".join(f"in_chans={channels} (patches of {side} pixels)" for channels, side in found)
    raise Untold(f"{file.path} has patches of {patch_dim} numbers: give {known or 'an in_chans that makes a square'}.")


def _is_square(size: Any, side: int) -> bool:
    return size == side or isinstance(size, Sequence) and list(size) == [side, side]


def _fits(img_size: Any, file: WeightsFile, side: int) -> bool:
    """Whether patches of `side` pixels make an image of that size at all positions that the file has."""
    count = math.prod(file.shapes.get("pos_embedding", ())[1:2]) - 1
    return count > 0 and _is_square(img_size, math.isqrt(count) * side)


def _unflatten(channels: int, side: int) -> Rule:
    """A patch projection [D, p * p * C], patch flattened as (row, column, channel) -> [D, C, p, p]."""
    return Rule(lambda weight: weight.view(-1, side, side, channels).permute(0, 3, 1, 2))


def _note_assumptions(source: Source, given: Mapping[str, Any]) -> None:
    """Notes each default that was used because neither the file nor the caller decides it."""
    channels, side, notes = source.settings["in_chans"], source.settings["patch_size"], source.report.notes
    if "pool" not in given:
        notes.append("taken with the class token, the package's default; pool='mean' takes the mean of all tokens")
    if not given.keys() & {"in_chans", "patch_size"}:
        whole = _fits(given.get("img_size"), source.file, side)
        others = [(4 * channels, side // 2)] if side % 2 == 0 and not whole else []
        others += [(channels // 4, 2 * side)] if channels % 4 == 0 else []
        notes += [f"taken as {channels} channels and patches of {side} pixels; in_chans={count} makes them {pixels}"
                  for count, pixels in others]


def first_rows(pos: Tensor, old: Grid, new: Grid) -> Tensor:
    """The rule of DeepViT-flax and vit-pytorch: a smaller image takes the first rows, a larger one has none."""
    tokens = 1 + new[0] * new[1]
    if tokens > pos.shape[1]:
        raise UserError(f"The weights have {pos.shape[1] - 1} positions, the model needs {tokens - 1}: there are "
                        f"none for larger images, choose a smaller img_size.")
    return pos[:, :tokens]


# vit-pytorch

def _block(attention: str, norm1: str, norm2: str, fc1: str, fc2: str) -> list[Row]:
    layer = "transformer.layers.{l}"
    return [
        *both(f"{layer}.{norm1}", "blocks.{l}.norm1"),
        Row(f"{layer}.{attention}.to_qkv.weight", "blocks.{l}.attn.qkv.weight"),
        Row(f"{layer}.{attention}.reattn_weights", "blocks.{l}.attn.mix.weight", TRANSPOSE),  # [source, new]
        *both(f"{layer}.{attention}.reattn_norm.1", "blocks.{l}.attn.norm"),
        *both(f"{layer}.{attention}.to_out.0", "blocks.{l}.attn.proj"),
        *both(f"{layer}.{norm2}", "blocks.{l}.norm2"),
        *both(f"{layer}.{fc1}", "blocks.{l}.mlp.fc1"),
        *both(f"{layer}.{fc2}", "blocks.{l}.mlp.fc2"),
    ]


CURRENT = _block("0", "0.norm", "1.net.0", "1.net.1", "1.net.4")  # since 1.4.4
WRAPPED = _block("0.fn.fn", "0.fn.norm", "1.fn.norm", "1.fn.fn.net.0", "1.fn.fn.net.3")  # before
FRAME = [Row("cls_token", "cls_token"), Row("pos_embedding", "pos_embed"),
         *both("mlp_head.0", "norm"), *both("mlp_head.1", "head")]


def _rows(file: WeightsFile, given: Mapping[str, Any]) -> list[Row]:
    """The patch projection is layer 2 of its stem since 1.0.0, between two LayerNorms."""
    normed = "to_patch_embedding.2.weight" in file.shapes
    linear = "to_patch_embedding.2" if normed else "to_patch_embedding.1"
    channels, side = _patch_sizes(file, (file.shapes.get(f"{linear}.weight") or (0,))[-1], given)
    reorder = Rule(lambda norm: norm.view(side, side, channels).permute(2, 0, 1).reshape(-1))  # (channel, row, column)
    norms = [*both("to_patch_embedding.1", "patch_embed.norm_in", reorder),
             *both("to_patch_embedding.3", "patch_embed.norm_out")] if normed else []
    return [*FRAME, Row(f"{linear}.weight", "patch_embed.proj.weight", _unflatten(channels, side)),
            Row(f"{linear}.bias", "patch_embed.proj.bias"), *norms,
            *(WRAPPED if "transformer.layers.0.0.fn.fn.reattn_weights" in file.shapes else CURRENT)]


def _infer(source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    _note_assumptions(source, given)
    return {"gelu": "erf", "norm_eps": 1e-5, "attention": attention_config("reattention_ln"), "pool": "cls",
            "final_norm": "after_pool"}


# DeepViT-flax

def _flax_block(l: int) -> list[Row]:
    attention, feed_forward = f"Transformer_0/Attention_{l}", f"Transformer_0/FeedForward_{l}"
    return [
        *flax_norm(f"Transformer_0/PreNorm_{2 * l}/LayerNorm_0", f"blocks.{l}.norm1"),
        Row(f"{attention}/Dense_0/kernel", f"blocks.{l}.attn.qkv.weight", TRANSPOSE),
        Row(f"{attention}/reattn_weights", f"blocks.{l}.attn.mix.weight", TRANSPOSE),  # [source, new] -> [new, source]
        *flax_norm(f"{attention}/LayerNorm_0", f"blocks.{l}.attn.norm"),
        *flax_dense(f"{attention}/Dense_1", f"blocks.{l}.attn.proj"),
        *flax_norm(f"Transformer_0/PreNorm_{2 * l + 1}/LayerNorm_0", f"blocks.{l}.norm2"),
        *flax_dense(f"{feed_forward}/Dense_0", f"blocks.{l}.mlp.fc1"),
        *flax_dense(f"{feed_forward}/Dense_1", f"blocks.{l}.mlp.fc2"),
    ]


def _flax_rows(file: WeightsFile, given: Mapping[str, Any]) -> list[Row]:
    depth = sum(name.endswith("/reattn_weights") for name in file.shapes)
    unflatten = _unflatten(*_patch_sizes(file, (file.shapes.get("Dense_0/kernel") or (0,))[0], given))
    return [
        Row("cls", "cls_token"),
        Row("pos_embedding", "pos_embed"),
        Row("Dense_0/kernel", "patch_embed.proj.weight", Rule(lambda kernel: unflatten.ours(kernel.t().contiguous()))),
        Row("Dense_0/bias", "patch_embed.proj.bias"),
        *(row for l in range(depth) for row in _flax_block(l)),
        *flax_norm("LayerNorm_0", "norm"),
        *flax_dense("Dense_1", "head"),
    ]


def _infer_flax(source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    attention = {**attention_config("reattention_ln"), "norm_eps": 1e-6}
    return _infer(source, given) | {"gelu": "tanh", "norm_eps": 1e-6, "attention": attention}


LUCIDRAINS = Dialect("lucidrains", lambda file: any(name.endswith(".reattn_weights") for name in file.shapes),
                     _rows, _infer, first_rows, square_only=True)
FLAX = Dialect("deepvit_flax", lambda file: any(name.endswith("/reattn_weights") for name in file.shapes),
               _flax_rows, _infer_flax, first_rows, square_only=True)
