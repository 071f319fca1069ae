"""conceptofmind/DeepViT-flax: its parameter tree, as .npz or as flax's msgpack, with or without `params/` in front."""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import Size

from deepvit.errors import Untold
from deepvit.importers.dialect import Dialect, Told
from deepvit.importers.files import WeightsFile
from deepvit.importers.positions import first_rows
from deepvit.importers.table import TRANSPOSE, Row, Rule, flax_dense, flax_norm
from deepvit.models import attention_config


def in_channels(patch_dim: int, positions: Sequence[int], given: Mapping[str, Any], source: str) -> tuple[int, int]:
    """(channels, patch side) of a flattened square patch of `patch_dim` numbers.

    By in_chans or patch_size where given, else by an img_size that just fits the file's `positions` (their shape), else
    3 channels; a square may be 1 channel or 4.

    Raises:
        UserError: nothing fits what is given, or nothing tells.
    """
    readings = [(patch_dim // side**2, side) for side in range(1, math.isqrt(max(patch_dim, 0)) + 1)
                if patch_dim % side**2 == 0]
    if given.get("in_chans"):
        found = [one for one in readings if one[0] == given["in_chans"]]
    elif given.get("patch_size"):
        found = [one for one in readings if _is_square(given["patch_size"], one[1])]
    else:
        found = ([one for one in readings if _fits(given.get("img_size"), positions, one[1])]
                 or [one for one in readings if one[0] == 3] or [one for one in readings if one[0] in (1, 4)])
    if len(found) == 1:
        return found[0]
    known = " or ".join(f"in_chans={channels} (patches of {side} pixels)" for channels, side in found)
    raise Untold(f"{source} has patches of {patch_dim} numbers: give {known or 'an in_chans that makes a square'}.")


def _is_square(size: Any, side: int) -> bool:
    return size == side or isinstance(size, Sequence) and list(size) == [side, side]


def _fits(img_size: Any, positions: Sequence[int], side: int) -> bool:
    """Whether patches of `side` pixels make an image of that size at all positions that the file has."""
    count = positions[1] - 1 if len(positions) == 3 else 0
    return count > 0 and _is_square(img_size, math.isqrt(count) * side)


def unflatten(channels: int, side: int) -> Rule:
    """A patch projection [D, p * p * C], patch flattened as (row, column, channel) -> [D, C, p, p]."""
    return Rule(lambda weight: weight.view(-1, side, side, channels).permute(0, 3, 1, 2))


def _block(l: int) -> list[Row]:
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


def _rows(file: WeightsFile, given: Mapping[str, Any]) -> Sequence[Row]:
    prefix = _prefix(file.shapes.keys())
    depth = sum(name.endswith("/reattn_weights") for name in file.shapes)
    kernel = file.shapes.get(f"{prefix}Dense_0/kernel", (0,))
    positions = file.shapes.get(f"{prefix}pos_embedding", ())
    patches = unflatten(*in_channels(kernel[0], positions, given, str(file.path)))
    rows = [
        Row("cls", "cls_token"),
        Row("pos_embedding", "pos_embed"),
        Row("Dense_0/kernel", "patch_embed.proj.weight", Rule(lambda kernel: patches.ours(kernel.t().contiguous()))),
        Row("Dense_0/bias", "patch_embed.proj.bias"),
        *(row for l in range(depth) for row in _block(l)),
        *flax_norm("LayerNorm_0", "norm"),
        *flax_dense("Dense_1", "head"),
    ]
    return [row._replace(foreign=prefix + row.foreign) for row in rows]


def _prefix(names: Set[str]) -> str:
    return "params/" if "params/pos_embedding" in names else ""


def _speaks(names: Set[str]) -> bool:
    return f"{_prefix(names)}Transformer_0/Attention_0/reattn_weights" in names


def assumptions(told: Mapping[str, Any], shapes: Mapping[str, Size], given: Mapping[str, Any]) -> list[str]:
    """Remarks on what was taken because neither file nor caller told it."""
    notes = [] if "pool" in given else ["the file does not tell its pooling: class token, the package's default; "
                                        "pool='mean' takes the mean of all tokens"]
    channels, side = told["in_chans"], told["patch_size"]
    if not given.keys() & {"in_chans", "patch_size"}:
        whole = _fits(given.get("img_size"), shapes["pos_embed"], side)
        others = [(4 * channels, side // 2)] if side % 2 == 0 and not whole else []
        others += [(channels // 4, 2 * side)] if channels % 4 == 0 else []
        notes += [f"taken as {channels} channels and patches of {side} pixels; in_chans={count} makes patches of "
                  f"{pixels} of them" for count, pixels in others]
    return notes


def _tells(file: WeightsFile, told: Mapping[str, Any], shapes: Mapping[str, Size], given: Mapping[str, Any]) -> Told:
    attention = {**attention_config("reattention_ln"), "norm_eps": 1e-6}
    return Told({"gelu": "tanh", "norm_eps": 1e-6, "attention": attention, "pool": "cls", "final_norm": "after_pool"},
                assumptions(told, shapes, given))


DIALECT = Dialect("deepvit_flax", _speaks, _rows, _tells, first_rows, square_only=True)
