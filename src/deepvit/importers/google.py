"""Google's .npz files (google-research/vision_transformer): ViT-B/16, B/32, L/16, L/32, H/14 and the R50 hybrids.

Google computes GELU by its tanh approximation, applies `pre_logits` where the file has it, and pads as SAME.
"""

from collections.abc import Mapping, Set
from typing import Any

from torch import Size, Tensor

from deepvit.importers import positions
from deepvit.importers.dialect import Dialect, Told
from deepvit.importers.files import WeightsFile
from deepvit.importers.table import HWIO, STACK, Row, Rule, flax_dense, flax_norm

BLOCK = "Transformer/encoderblock_{l}"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_1"
QKV = ("query", "key", "value")


def _qkv(*kernels: Tensor) -> Tensor:
    """Three kernels [D, H, d] -> [3 * H * d, D]."""
    width, heads, head_dim = kernels[0].shape
    return STACK.ours(*(kernel.reshape(width, heads * head_dim).t() for kernel in kernels))


def _qkv_bias(*biases: Tensor) -> Tensor:
    return STACK.ours(*(bias.reshape(-1) for bias in biases))


UNIT, OUR_UNIT = "block{b}/unit{u}", "patch_embed.body.block{b}.unit{u}"
ROWS = [
    Row("cls", "cls_token"),
    Row("Transformer/posembed_input/pos_embedding", "pos_embed"),
    Row("embedding/kernel", "patch_embed.proj.weight", HWIO),
    Row("embedding/bias", "patch_embed.proj.bias"),
    *flax_norm(f"{BLOCK}/LayerNorm_0", "blocks.{l}.norm1"),
    Row(tuple(f"{ATTENTION}/{part}/kernel" for part in QKV), "blocks.{l}.attn.qkv.weight", Rule(_qkv)),
    Row(tuple(f"{ATTENTION}/{part}/bias" for part in QKV), "blocks.{l}.attn.qkv.bias", Rule(_qkv_bias)),
    Row(f"{ATTENTION}/out/kernel", "blocks.{l}.attn.proj.weight",
        Rule(lambda kernel: kernel.flatten(0, 1).t())),  # [H, d, D] -> [D, H * d]
    Row(f"{ATTENTION}/out/bias", "blocks.{l}.attn.proj.bias"),
    *flax_norm(f"{BLOCK}/LayerNorm_2", "blocks.{l}.norm2"),
    *flax_dense(f"{BLOCK}/MlpBlock_3/Dense_0", "blocks.{l}.mlp.fc1"),
    *flax_dense(f"{BLOCK}/MlpBlock_3/Dense_1", "blocks.{l}.mlp.fc2"),
    *flax_norm("Transformer/encoder_norm", "norm"),
    *flax_dense("pre_logits", "pre_logits.0"),
    *flax_dense("head", "head"),
    # R50 hybrids
    Row("conv_root/kernel", "patch_embed.root.conv.weight", HWIO),
    *flax_norm("gn_root", "patch_embed.root.gn"),
    *(Row(f"{UNIT}/conv{i}/kernel", f"{OUR_UNIT}.conv{i}.weight", HWIO) for i in (1, 2, 3)),
    *(row for i in (1, 2, 3) for row in flax_norm(f"{UNIT}/gn{i}", f"{OUR_UNIT}.gn{i}")),
    Row(f"{UNIT}/conv_proj/kernel", f"{OUR_UNIT}.downsample.weight", HWIO),
    *flax_norm(f"{UNIT}/gn_proj", f"{OUR_UNIT}.gn_proj"),
]


def speaks(names: Set[str]) -> bool:
    return "Transformer/posembed_input/pos_embedding" in names


def heads(file: WeightsFile) -> int:
    """H as the query kernel [D, H, d] has it."""
    return file.shapes[f"{ATTENTION}/query/kernel".format(l=0)][1]


def with_arithmetic(stem: Any, arithmetic: str) -> Any:
    """The stem's settings; a hybrid's with the side of ARITHMETICS it is to follow."""
    return stem if isinstance(stem, str) else {**stem, "arithmetic": arithmetic}


def _tells(file: WeightsFile, told: Mapping[str, Any], shapes: Mapping[str, Size], given: Mapping[str, Any]) -> Told:
    note = "taken as Google's (tanh GELU, pre_logits applied); dialect='vit_pytorch' computes the file as ViT-pytorch"
    return Told({"gelu": "tanh", "norm_eps": 1e-6, "stem": with_arithmetic(told["stem"], "google"),
                 "num_heads": heads(file)}, [note])


DIALECT = Dialect("google", speaks, lambda file, given: ROWS, _tells, positions.google, square_only=True)
