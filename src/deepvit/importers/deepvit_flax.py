"""conceptofmind/DeepViT-flax: its parameter tree, as .npz or as flax's msgpack, with or without `params/` in front."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import Size

from deepvit.errors import UserError
from deepvit.importers.dialect import Dialect, Told
from deepvit.importers.files import WeightsFile
from deepvit.importers.positions import first_rows
from deepvit.importers.table import TRANSPOSE, Row, Rule
from deepvit.models import attention_config


def in_channels(patch_dim: int, given: Mapping[str, Any], source: str) -> tuple[int, int]:
    """(channels, patch side) of a flattened square patch: what is given, else 3 channels, else 1.

    3 p^2 is never a square, so colour and grey cannot be mistaken; other counts must be given.
    """
    for channels in [given["in_chans"]] if given.get("in_chans") else [3, 1]:
        side = round((patch_dim / channels) ** 0.5)
        if side and channels * side**2 == patch_dim:
            return channels, side
    raise UserError(f"{source} has patches of {patch_dim} numbers, no square of {given.get('in_chans', '3 or 1')} "
                    f"channels: give in_chans=...")


def unflatten(channels: int, side: int) -> Rule:
    """A patch projection [D, p * p * C], patch flattened as (row, column, channel) -> [D, C, p, p]."""
    return Rule(lambda weight: weight.view(-1, side, side, channels).permute(0, 3, 1, 2))


def _dense(foreign: str, ours: str) -> list[Row]:
    return [Row(f"{foreign}/kernel", f"{ours}.weight", TRANSPOSE), Row(f"{foreign}/bias", f"{ours}.bias")]


def _norm(foreign: str, ours: str) -> list[Row]:
    return [Row(f"{foreign}/scale", f"{ours}.weight"), Row(f"{foreign}/bias", f"{ours}.bias")]


def _block(l: int) -> list[Row]:
    attention, feed_forward = f"Transformer_0/Attention_{l}", f"Transformer_0/FeedForward_{l}"
    return [
        *_norm(f"Transformer_0/PreNorm_{2 * l}/LayerNorm_0", f"blocks.{l}.norm1"),
        Row(f"{attention}/Dense_0/kernel", f"blocks.{l}.attn.qkv.weight", TRANSPOSE),
        Row(f"{attention}/reattn_weights", f"blocks.{l}.attn.mix.weight", TRANSPOSE),  # [source, new] -> [new, source]
        *_norm(f"{attention}/LayerNorm_0", f"blocks.{l}.attn.norm"),
        *_dense(f"{attention}/Dense_1", f"blocks.{l}.attn.proj"),
        *_norm(f"Transformer_0/PreNorm_{2 * l + 1}/LayerNorm_0", f"blocks.{l}.norm2"),
        *_dense(f"{feed_forward}/Dense_0", f"blocks.{l}.mlp.fc1"),
        *_dense(f"{feed_forward}/Dense_1", f"blocks.{l}.mlp.fc2"),
    ]


def _rows(file: WeightsFile, given: Mapping[str, Any]) -> Sequence[Row]:
    prefix = _prefix(file.shapes.keys())
    depth = sum(name.endswith("/reattn_weights") for name in file.shapes)
    kernel = file.shapes.get(f"{prefix}Dense_0/kernel", (0,))
    patches = unflatten(*in_channels(kernel[0], given, str(file.path)))
    rows = [
        Row("cls", "cls_token"),
        Row("pos_embedding", "pos_embed"),
        Row("Dense_0/kernel", "patch_embed.proj.weight", Rule(lambda kernel: patches.ours(kernel.t().contiguous()))),
        Row("Dense_0/bias", "patch_embed.proj.bias"),
        *(row for l in range(depth) for row in _block(l)),
        *_norm("LayerNorm_0", "norm"),
        *_dense("Dense_1", "head"),
    ]
    return [row._replace(foreign=prefix + row.foreign) for row in rows]


def _prefix(names: Set[str]) -> str:
    return "params/" if "params/pos_embedding" in names else ""


def _speaks(names: Set[str]) -> bool:
    return f"{_prefix(names)}Transformer_0/Attention_0/reattn_weights" in names


def pooling(given: Mapping[str, Any]) -> list[str]:
    return [] if "pool" in given else ["the file does not tell its pooling: class token, the package's default; "
                                       "pool='mean' takes the mean of all tokens"]


def _tells(file: WeightsFile, told: Mapping[str, Any], shapes: Mapping[str, Size], given: Mapping[str, Any]) -> Told:
    attention = {**attention_config("reattention_ln"), "norm_eps": 1e-6}
    return Told({"gelu": "tanh", "norm_eps": 1e-6, "attention": attention, "pool": "cls", "final_norm": "after_pool"},
                pooling(given))


DIALECT = Dialect("deepvit_flax", _speaks, _rows, _tells, first_rows)
