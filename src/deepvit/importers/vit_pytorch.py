"""jeonsworld/ViT-pytorch: Google's .npz files by its arithmetic (erf GELU, no pre_logits), and the .bin it saves."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import Size

from deepvit.importers import google, positions
from deepvit.importers.dialect import Dialect, Told
from deepvit.importers.files import WeightsFile
from deepvit.importers.table import STACK, Row, both

NO_PRE_LOGITS = "ViT-pytorch has no pre_logits layer and ignores it"
NPZ_ROWS = [row._replace(ours=None, why=NO_PRE_LOGITS) if row.ours.startswith("pre_logits") else row
            for row in google.ROWS]

EMBED, LAYER = "transformer.embeddings", "transformer.encoder.layer.{l}"
UNIT = f"{EMBED}.hybrid_model.body.block{{b}}.unit{{u}}"


BIN_ROWS = [
    Row(f"{EMBED}.cls_token", "cls_token"),
    Row(f"{EMBED}.position_embeddings", "pos_embed"),
    *both(f"{EMBED}.patch_embeddings", "patch_embed.proj"),
    *both(f"{LAYER}.attention_norm", "blocks.{l}.norm1"),
    *(Row(tuple(f"{LAYER}.attn.{part}.{name}" for part in google.QKV), f"blocks.{{l}}.attn.qkv.{name}", STACK)
      for name in ("weight", "bias")),
    *both(f"{LAYER}.attn.out", "blocks.{l}.attn.proj"),
    *both(f"{LAYER}.ffn_norm", "blocks.{l}.norm2"),
    *both(f"{LAYER}.ffn.fc1", "blocks.{l}.mlp.fc1"),
    *both(f"{LAYER}.ffn.fc2", "blocks.{l}.mlp.fc2"),
    *both("transformer.encoder.encoder_norm", "norm"),
    *both("head", "head"),
    Row(f"{EMBED}.hybrid_model.root.conv.weight", "patch_embed.root.conv.weight"),
    *both(f"{EMBED}.hybrid_model.root.gn", "patch_embed.root.gn"),
    *(Row(f"{UNIT}.{layer}.weight", f"{google.OUR_UNIT}.{layer}.weight")
      for layer in ("conv1", "conv2", "conv3", "downsample")),
    *(row for layer in ("gn1", "gn2", "gn3", "gn_proj")
      for row in both(f"{UNIT}.{layer}", f"{google.OUR_UNIT}.{layer}")),
]
ZOO_HEADS = {768: 12, 1024: 16, 1280: 16}  # width -> heads in ViT-pytorch's configs, which a .bin does not tell


def _speaks(names: Set[str]) -> bool:
    return "transformer.embeddings.position_embeddings" in names


def _rows(file: WeightsFile, given: Mapping[str, Any]) -> Sequence[Row]:
    return NPZ_ROWS if google.speaks(file.shapes.keys()) else BIN_ROWS


def _tells(file: WeightsFile, told: Mapping[str, Any], shapes: Mapping[str, Size], given: Mapping[str, Any]) -> Told:
    rest: dict[str, Any] = {"gelu": "erf", "norm_eps": 1e-6,
                            "stem": google.with_arithmetic(told["stem"], "vit_pytorch")}
    if google.speaks(file.shapes.keys()):
        return Told(rest | {"num_heads": google.heads(file)})
    heads = given.get("num_heads") or ZOO_HEADS.get(told["embed_dim"])
    notes = [] if "num_heads" in given or heads is None else [
        f"{heads} heads, as ViT-pytorch's models of width {told['embed_dim']} have; the file does not tell"]
    return Told(rest | ({"num_heads": heads} if heads else {}), notes)


DIALECT = Dialect("vit_pytorch", _speaks, _rows, _tells, positions.google, square_only=True)
