"""One Vision Transformer of interchangeable parts: stem + blocks + head. DeepViT is a configuration of it."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepvit.errors import UserError, did_you_mean
from deepvit.models.attention import ATTENTIONS, Attention
from deepvit.models.blocks import BLOCKS
from deepvit.models.init import init_weights
from deepvit.models.recompute import checkpoint_block
from deepvit.models.stem import stem_of

POOLS = {
    "cls": lambda tokens: tokens[:, 0],
    "mean": lambda tokens: tokens.mean(1),  # class token included, as vit-pytorch and DeepViT-flax
    "avg": lambda tokens: tokens[:, 1:].mean(1),  # patch tokens only, as timm
}


class ViT(nn.Module):
    """Vision Transformer: pictures `[B, in_chans, height, width]` -> logits `[B, C]`.

    Args:
        img_size, patch_size: pixels, one number or (height, width).
        num_classes: C; 0 leaves the head out.
        embed_dim, depth, num_heads, head_dim: D, number of blocks, H, width of a head (default D / H).
        mlp_ratio: hidden width of the MLP over D.
        stem: `patch`, `conv` or `hybrid`, or `{"name": one of them, ...its options}`.
        attention: `{"class": a class of models.attention, ...its options}`.
        reattention_blocks: the blocks that have that attention, as indices (negative from the end) or a slice such
            as "-12:"; the others have plain self-attention. None: all.
        qk_scale, map_scale: factors on `q k^T` (default head_dim^-0.5) and on the final maps of those blocks.
        residual_scale: see `blocks.Block`.
        drop_rate, pos_drop_rate, attn_drop_rate, drop_path_rate: dropout in MLP and projection, after the position
            embedding, on the maps; stochastic depth of the last block (linear from 0).
        init_values: initial LayerScale, 0 included; None: no LayerScale.
        pool, final_norm: class token, mean of all tokens, or avg of the patch tokens; LayerNorm before or after it.
        patch_norm: LayerNorms around the patch projection (vit-pytorch).
        representation_size: width of the tanh layer before the head (`pre_logits`); None: no such layer.
        block: "pre_norm", or "deepnorm" for very deep models: see `blocks.DeepNormBlock`.
        feat_scale: see `blocks.FeatScale`.
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, patch_size: int | tuple[int, int] = 16, in_chans: int = 3,
                 num_classes: int = 1000, embed_dim: int = 384, depth: int = 12, num_heads: int = 12,
                 head_dim: int | None = None, mlp_ratio: float = 3.0, qkv_bias: bool = True,
                 qk_scale: float | None = None, stem: str | Mapping[str, Any] = "patch",
                 attention: Mapping[str, Any] | None = None,
                 reattention_blocks: list[int] | str | None = None, map_scale: float = 1.0,
                 residual_scale: float = 1.0, drop_rate: float = 0.0, pos_drop_rate: float = 0.0,
                 attn_drop_rate: float = 0.0, drop_path_rate: float = 0.0, init_values: float | None = None,
                 pool: Literal["cls", "mean", "avg"] = "cls", gelu: Literal["erf", "tanh"] = "erf",
                 norm_eps: float = 1e-6, patch_norm: bool = False,
                 final_norm: Literal["before_pool", "after_pool"] = "before_pool",
                 representation_size: int | None = None, block: Literal["pre_norm", "deepnorm"] = "pre_norm",
                 feat_scale: bool = False):
        super().__init__()
        self.img_size, self.patch_size = _pair(img_size), _pair(patch_size)
        self.grid_size = _grid(self.img_size, self.patch_size)  # (rows, columns) of patches
        self.num_classes, self.embed_dim, self.depth = num_classes, embed_dim, depth
        self.pool, self.final_norm = pool, final_norm
        self.grad_checkpointing = False

        (make_stem, options), make_block = stem_of(stem), _choose("block", block, BLOCKS)
        self.patch_embed = make_stem(in_chans, embed_dim, self.patch_size, norm=patch_norm, norm_eps=norm_eps,
                                     **options)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid_size[0] * self.grid_size[1], embed_dim))
        self.pos_drop = nn.Dropout(pos_drop_rate)

        chosen = _block_indices(reattention_blocks, depth)
        shared = dict(num_heads=num_heads, head_dim=head_dim, qkv_bias=qkv_bias, qk_scale=qk_scale,
                      attn_drop=attn_drop_rate, proj_drop=drop_rate)
        rule = {"map_scale": map_scale, **(attention or {"class": "SelfAttention"})}
        self.blocks = nn.Sequential(*(
            make_block(embed_dim, _attention(rule if i in chosen else {"class": "SelfAttention"}, embed_dim, shared,
                                             block_index=i, depth=depth),
                       mlp_ratio, drop_rate, drop_path_rate * i / max(1, depth - 1), init_values, gelu, norm_eps,
                       residual_scale=residual_scale, feat_scale=feat_scale, depth=depth)
            for i in range(depth)))

        self.norm = nn.LayerNorm(embed_dim, norm_eps)
        self.num_features = self.head_hidden_size = representation_size or embed_dim
        self.pre_logits = (nn.Sequential(nn.Linear(embed_dim, representation_size), nn.Tanh())
                           if representation_size else nn.Identity())
        self.head = _head(self.num_features, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Pictures -> tokens `[B, 1 + patches, D]` after the last block (and the final norm, if it comes first)."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise UserError(f"The pictures are {x.shape[-2]}x{x.shape[-1]} pixels, the model is built for "
                            f"{self.img_size[0]}x{self.img_size[1]}: set model.img_size.")
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        for block in self.blocks:
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint_block(block, x) if recompute else block(x)
        return self.norm(x) if self.final_norm == "before_pool" else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> logits `[B, C]`, or with `pre_logits` what the classifier sees, `[B, num_features]`."""
        x = POOLS[self.pool](x)
        x = self.norm(x) if self.final_norm == "after_pool" else x
        x = self.pre_logits(x)
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` (0: none). `global_pool` may be timm's "token" and "avg", or ours."""
        if global_pool is not None:
            pool = {"token": "cls"}.get(global_pool, global_pool)
            if pool not in POOLS:
                raise UserError(f"'{global_pool}' is no pooling of this model: choose from token, {', '.join(POOLS)}.")
            self.pool = pool
        self.num_classes = num_classes
        self.head = _head(self.num_features, num_classes).to(self.cls_token.device, self.cls_token.dtype)
        init_weights(self.head)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's rule for layer-wise learning rates: stem, then one group a block, then the rest."""
        return {"stem": r"^cls_token|pos_embed|patch_embed",
                "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _grid(img_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    for pixels, patch in zip(img_size, patch_size):
        if patch < 1 or pixels < patch or pixels % patch:
            raise UserError(f"Patches of {patch_size[0]}x{patch_size[1]} pixels do not tile pictures of "
                            f"{img_size[0]}x{img_size[1]}: change model.img_size or model.patch_size.")
    return img_size[0] // patch_size[0], img_size[1] // patch_size[1]


def _choose(setting: str, name: str, choices: Mapping[str, Any]) -> Any:
    if name not in choices:
        raise UserError(f"model.{setting}={name} is not known: choose from {', '.join(choices)}."
                        f"{did_you_mean(name, choices)}")
    return choices[name]


def _attention(rule: Mapping[str, Any], dim: int, shared: Mapping[str, Any], **place: int) -> Attention:
    """An attention by its rule; a class that has parameters `block_index` or `depth` is told where it stands."""
    options = {name: value for name, value in rule.items() if name not in ("class", "name")}
    cls = ATTENTIONS.get(rule.get("class", ""))
    if cls is None:
        raise UserError(f"model.attention.class={rule.get('class')} is not known: choose from "
                        f"{', '.join(ATTENTIONS)}.{did_you_mean(rule.get('class', ''), ATTENTIONS)}")
    place = {name: value for name, value in place.items() if name in inspect.signature(cls).parameters}
    return cls(dim, **{**shared, **options, **place})


def _block_indices(chosen: Sequence[int] | str | None, depth: int) -> set[int]:
    """Indices from `[11, -1]` or the slice `"-12:"`; all blocks for None."""
    if chosen is None:
        return set(range(depth))
    if isinstance(chosen, str):
        try:
            return set(range(depth)[slice(*(int(part) if part else None for part in chosen.split(":")))])
        except (ValueError, TypeError):
            raise UserError(f"model.reattention_blocks='{chosen}' is no slice such as '-12:': "
                            f"give one, or a list of block indices.") from None
    for index in chosen:
        if not -depth <= index < depth:
            raise UserError(f"model.reattention_blocks names block {index}, but the model has {depth} blocks "
                            f"(0 to {depth - 1}, or negative from the end).")
    return {index % depth for index in chosen}


def _head(features: int, num_classes: int) -> nn.Module:
    return nn.Linear(features, num_classes) if num_classes else nn.Identity()
