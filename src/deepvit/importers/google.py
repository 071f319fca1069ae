"""Google's .npz files (google-research/vision_transformer): ViT-B/16, B/32, L/16, L/32, H/14 and the R50 hybrids.
Google computes GELU by its tanh approximation, applies `pre_logits` where the file has it, and pads as SAME.
jeonsworld/ViT-pytorch reads the same files by its own arithmetic (erf GELU, no pre_logits) and saves a .bin."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from deepvit.errors import UserError
from deepvit.importers.dialect import Dialect, Row, Rule, Source, both, flax_dense, flax_norm
from deepvit.importers.files import WeightsFile
from deepvit.importers.settings import Grid

HWIO = Rule(lambda kernel: kernel.permute(3, 2, 0, 1))  # [rows, columns, in, out] -> [out, in, rows, columns]
MERGE_HEADS = Rule(lambda kernel: kernel.flatten(0, 1).t())  # [H, d, D] -> [D, H * d]
STACK = Rule(lambda *parts: torch.cat(parts))  # q, k, v -> rows of qkv
STACK_KERNELS = Rule(lambda *kernels: torch.cat([kernel.flatten(1, 2).t() for kernel in kernels]))  # each [D, H, d]
STACK_BIASES = Rule(lambda *biases: torch.cat([bias.flatten() for bias in biases]))  # each [H, d]

BLOCK = "Transformer/encoderblock_{l}"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_1"
QKV = ("query", "key", "value")
UNIT, OUR_UNIT = "block{b}/unit{u}", "patch_embed.body.block{b}.unit{u}"
NPZ_ROWS = [
    Row("cls", "cls_token"),
    Row("Transformer/posembed_input/pos_embedding", "pos_embed"),
    Row("embedding/kernel", "patch_embed.proj.weight", HWIO),
    Row("embedding/bias", "patch_embed.proj.bias"),
    *flax_norm(f"{BLOCK}/LayerNorm_0", "blocks.{l}.norm1"),
    Row(tuple(f"{ATTENTION}/{part}/kernel" for part in QKV), "blocks.{l}.attn.qkv.weight", STACK_KERNELS),
    Row(tuple(f"{ATTENTION}/{part}/bias" for part in QKV), "blocks.{l}.attn.qkv.bias", STACK_BIASES),
    Row(f"{ATTENTION}/out/kernel", "blocks.{l}.attn.proj.weight", MERGE_HEADS),
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
VIT_PYTORCH_NPZ_ROWS = [
    row._replace(ours=None, why="ViT-pytorch has no pre_logits layer and ignores it")
    if row.ours.startswith("pre_logits") else row for row in NPZ_ROWS]

EMBED, LAYER = "transformer.embeddings", "transformer.encoder.layer.{l}"
BIN_UNIT = f"{EMBED}.hybrid_model.body.block{{b}}.unit{{u}}"
BIN_ROWS = [
    Row(f"{EMBED}.cls_token", "cls_token"),
    Row(f"{EMBED}.position_embeddings", "pos_embed"),
    *both(f"{EMBED}.patch_embeddings", "patch_embed.proj"),
    *both(f"{LAYER}.attention_norm", "blocks.{l}.norm1"),
    Row(tuple(f"{LAYER}.attn.{part}.{{n}}" for part in QKV), "blocks.{l}.attn.qkv.{n}", STACK),
    *both(f"{LAYER}.attn.out", "blocks.{l}.attn.proj"),
    *both(f"{LAYER}.ffn_norm", "blocks.{l}.norm2"),
    *both(f"{LAYER}.ffn.fc1", "blocks.{l}.mlp.fc1"),
    *both(f"{LAYER}.ffn.fc2", "blocks.{l}.mlp.fc2"),
    *both("transformer.encoder.encoder_norm", "norm"),
    *both("head"),
    Row(f"{EMBED}.hybrid_model.root.{{n}}", "patch_embed.root.{n}"),
    Row(f"{BIN_UNIT}.{{n}}", f"{OUR_UNIT}.{{n}}"),
]
ZOO_HEADS = {768: 12, 1024: 16, 1280: 16}  # width -> heads in ViT-pytorch's configs, which a .bin does not tell


def _is_npz(file: WeightsFile) -> bool:
    return "Transformer/posembed_input/pos_embedding" in file.shapes


def _infer_google(source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    source.report.notes.append("taken as Google's (tanh GELU, pre_logits applied); or give dialect='vit_pytorch'")
    return _infer_both(source, "google") | {"gelu": "tanh"}


def _infer_vit_pytorch(source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    settings, width = _infer_both(source, "vit_pytorch") | {"gelu": "erf"}, source.settings["embed_dim"]
    if "num_heads" not in source.settings | given and width in ZOO_HEADS:
        settings["num_heads"] = ZOO_HEADS[width]
        source.report.notes.append(f"{ZOO_HEADS[width]} heads, as in ViT-pytorch's models of width {width}")
    return settings


def _infer_both(source: Source, arithmetic: str) -> dict[str, Any]:
    """A hybrid's stem with its arithmetic; H, which the query kernel [D, H, d] of a .npz decides."""
    if query := source.file.shapes.get(f"{ATTENTION}/query/kernel".format(l=0)):
        source.settings["num_heads"] = query[1]
    stem = source.settings["stem"]
    return {"norm_eps": 1e-6, "stem": stem if isinstance(stem, str) else {**stem, "arithmetic": arithmetic}}


def zoom(pos: Tensor, old: Grid, new: Grid) -> Tensor:
    """Google's rule and ViT-pytorch's, `scipy.ndimage.zoom(order=1)`: bilinear between aligned corners. Where scipy's
    rounding leaves its last row and column at zero (35 pairs of sides, such as 16 -> 30) this refuses."""
    factors = new[0] / old[0], new[1] / old[1]
    if not ndimage.zoom(np.ones(old), factors, order=1).all():
        raise UserError(f"Google's rule for {old[0]}x{old[1]} -> {new[0]}x{new[1]} leaves zeros: change img_size.")
    grid = ndimage.zoom(pos[0, 1:].unflatten(0, old).float().numpy(), (*factors, 1), order=1)  # [rows, columns, D]
    return torch.cat([pos[:, :1].float(), torch.from_numpy(grid).flatten(0, 1)[None]], dim=1)


GOOGLE = Dialect("google", _is_npz, lambda file, given: NPZ_ROWS, _infer_google, zoom, square_only=True)
VIT_PYTORCH = Dialect("vit_pytorch", lambda file: f"{EMBED}.position_embeddings" in file.shapes,
                      lambda file, given: VIT_PYTORCH_NPZ_ROWS if _is_npz(file) else BIN_ROWS, _infer_vit_pytorch, zoom,
                      square_only=True)
