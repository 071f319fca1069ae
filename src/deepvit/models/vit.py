"""One Vision Transformer of interchangeable parts: stem + blocks + head. DeepViT is a configuration of it."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from deepvit.errors import UserError, choose
from deepvit.models.attention import ATTENTIONS, Attention
from deepvit.models.blocks import BLOCKS, checkpoint_block, share_among
from deepvit.models.init import draw_seed, init_weights
from deepvit.models.stem import PatchStem, Pixels, plain, stem_of

PLAIN = {"class": "SelfAttention"}
POOLS = {
    "cls": lambda tokens: tokens[:, 0],
    "mean": lambda tokens: tokens.mean(1),  # class token included, as vit-pytorch and DeepViT-flax
    "avg": lambda tokens: tokens[:, 1:].mean(1),  # patch tokens only, as timm
    "": lambda tokens: tokens,  # none: the head sees every token
}


class ViT(nn.Module):
    """Vision Transformer: images `[B, in_chans, height, width]` -> logits `[B, C]`, C = `num_classes` (0: no head).
    `.config` holds the plain settings that rebuild it, kept up to date by `reset_classifier` and `set_input_size`.

    The settings are explained in `conf/model/vit.yaml`. Beyond that, `stem` may be `{"name": one of the stems, ...its
    options}`, `attention` is `{"class": a class of models.attention, ...its options}`, and all blocks but those that
    `reattention_blocks` chooses have plain self-attention. `pool=""` gives the logits of every token, `[B, N, C]`. See
    also `blocks.Block`, `blocks.DeepNormBlock`, `blocks.FeatScale`, `init.init_weights` and `init.mimic`."""

    img_size = property(lambda self: self.patch_embed.img_size)
    patch_size = property(lambda self: self.patch_embed.patch_size)
    grid_size = property(lambda self: self.patch_embed.grid_size)  # (rows, columns) of patches
    input_size = property(lambda self: self.patch_embed.input_size)  # (channels, height, width)
    global_pool = property(lambda self: {"cls": "token"}.get(self.pool, self.pool))  # timm's name for `pool`
    num_prefix_tokens = 1

    def __init__(self, img_size: int | tuple[int, int] = 224, patch_size: int | tuple[int, int] = 16, in_chans: int = 3,
                 num_classes: int = 1000, embed_dim: int = 384, depth: int = 12, num_heads: int = 12,
                 head_dim: int | None = None, mlp_ratio: float = 3.0, qkv_bias: bool = True,
                 qk_scale: float | None = None, stem: str | Mapping[str, Any] = "patch",
                 attention: Mapping[str, Any] | None = None, reattention_blocks: list[int] | str | None = None,
                 map_scale: float = 1.0, residual_scale: float = 1.0, drop_rate: float = 0.0,
                 pos_drop_rate: float = 0.0, attn_drop_rate: float = 0.0, drop_path_rate: float = 0.0,
                 init_values: float | None = None, pool: Literal["cls", "mean", "avg", ""] = "cls",
                 gelu: Literal["erf", "tanh"] = "erf", norm_eps: float = 1e-6, patch_norm: bool = False,
                 final_norm: Literal["before_pool", "after_pool"] = "before_pool",
                 representation_size: int | None = None, block: Literal["pre_norm", "deepnorm"] = "pre_norm",
                 feat_scale: bool = False, init_std: float | None = None,
                 weight_init: Literal["mimetic"] | None = None, share_maps: int = 1):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        seed, before = draw_seed(), torch.get_rng_state()
        self.in_chans, self.num_classes, self.embed_dim, self.depth = in_chans, num_classes, embed_dim, depth
        self.pool, self.final_norm = pool, final_norm
        self.grad_checkpointing = False

        (make_stem, options), make_block = stem_of(stem), choose("block", block, BLOCKS)
        rule = {"map_scale": map_scale, **(attention or PLAIN)}
        if rule.get("norm") or "norm_batch" in rule:  # all batch norms take the same images
            options = {**_wanted(make_stem, norm_batch=rule.get("norm_batch")), **options}
        if patch_norm:
            if make_stem is not PatchStem:
                raise UserError("patch_norm goes with stem=patch only: leave it off.")
            options["norm_eps"] = norm_eps
        self.patch_embed = make_stem(to_2tuple(img_size), to_2tuple(patch_size), in_chans, embed_dim, **options)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.pos_drop = nn.Dropout(pos_drop_rate)

        chosen = _block_indices(reattention_blocks, depth)
        shared = dict(num_heads=num_heads, head_dim=head_dim, qkv_bias=qkv_bias, qk_scale=qk_scale,
                      attn_drop=attn_drop_rate, proj_drop=drop_rate)
        self.blocks = nn.Sequential(*(
            make_block(embed_dim, _attention(rule if i in chosen else PLAIN, embed_dim, shared, i, depth),
                       mlp_ratio, drop_rate, drop_path_rate * i / max(1, depth - 1), init_values, gelu, norm_eps,
                       residual_scale=residual_scale, feat_scale=feat_scale, depth=depth)
            for i in range(depth)))
        self.feature_info = [{"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": self.patch_embed.feat_ratio()}
                             for i in range(depth)]

        self.norm = nn.LayerNorm(embed_dim, norm_eps)
        self.num_features, self.head_hidden_size = embed_dim, representation_size or embed_dim
        self.pre_logits = (nn.Sequential(nn.Linear(embed_dim, representation_size), nn.Tanh())
                           if representation_size else nn.Identity())
        self.head = _head(self.head_hidden_size, num_classes)
        self._frozen: list[nn.Module] = []
        self.share_maps = share_maps
        if share_maps > 1:
            share_among(self.blocks, share_maps, weight_init)
        if weight_init and block == "deepnorm":
            raise UserError(f"block=deepnorm has its own initialisation: leave weight_init={weight_init} out.")
        init_weights(self, init_std, seed, mimetic=weight_init == "mimetic")
        torch.set_rng_state(before)  # what the layers drew as they were built differs from model to model

    @property
    def norm_batches(self) -> set[int | None]:
        """Images over which its batch norms take their statistics (None: the whole batch); empty: no such norms."""
        return {module.norm_batch for module in self.modules()
                if hasattr(module, "norm_batch") and getattr(module, "norm", module) is not None}

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> tokens `[B, 1 + patches, D]` after the last block (and the final norm, if it comes first)."""
        x = self._embed(x)
        *_, x = self._after_each(self.blocks, x)
        return self._norm_of_tokens(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> logits `[B, C]`, or with `pre_logits` what the classifier sees, `[B, head_hidden_size]`."""
        x = POOLS[self.pool](x)
        x = self.norm(x) if self.final_norm == "after_pool" else x
        x = self.pre_logits(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(self, x: Tensor, indices: int | Sequence[int] | None = None,
                              return_prefix_tokens: bool = False, norm: bool = False, stop_early: bool = False,
                              output_fmt: Literal["NCHW", "NLC"] = "NCHW", intermediates_only: bool = False,
                              output_dict: bool = False) -> Any:
        """The tokens after some blocks, with the arguments and results of timm's
        `VisionTransformer.forward_intermediates`: `forward_features(x)` and a list of `[B, D, rows, columns]` (NCHW) or
        `[B, patches, D]` (NLC). `indices` counts blocks (negative from the end), or says how many of the last."""
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt={output_fmt} is not known: choose NCHW or NLC.")
        wanted, last = feature_take_indices(len(self.blocks), indices)
        x = self._embed(x)
        taken = []
        blocks = self.blocks[:last + 1] if stop_early else self.blocks
        for i, x in enumerate(self._after_each(blocks, x)):  # noqa: B020
            if i in wanted:
                taken.append(self._norm_of_tokens(x) if norm else x)
        prefixes, features = [tokens[:, :1] for tokens in taken], [tokens[:, 1:] for tokens in taken]
        if output_fmt == "NCHW":
            features = [tokens.mT.unflatten(2, self.grid_size).contiguous() for tokens in features]
        if output_dict:
            return {"image_intermediates": features,
                    **({"image_intermediates_prefix": prefixes} if return_prefix_tokens else {}),
                    **({} if intermediates_only else {"image_features": self._norm_of_tokens(x)})}
        features = list(zip(features, prefixes)) if return_prefix_tokens else features
        return features if intermediates_only else (self._norm_of_tokens(x), features)

    def get_intermediate_layers(self, x: Tensor, n: int | Sequence[int] = 1, reshape: bool = False,
                                return_prefix_tokens: bool = False, norm: bool = False) -> list[Any]:
        """`forward_intermediates` with DINO's signature."""
        return self.forward_intermediates(x, n, return_prefix_tokens, norm, output_fmt="NCHW" if reshape else "NLC",
                                          intermediates_only=True)

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, prune_norm: bool = False,
                                  prune_head: bool = True) -> list[int]:
        """Drops what these intermediates do not need; `.config` still describes the whole model."""
        wanted, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[:last + 1]
        if prune_norm if self.final_norm == "before_pool" else prune_head:
            self.norm = nn.Identity()
        if prune_head:
            self.pre_logits, self.head, self.pool, self.num_classes = nn.Identity(), nn.Identity(), "", 0
        return wanted

    def _embed(self, x: Tensor) -> Tensor:
        """Images -> tokens `[B, 1 + patches, D]` for the first block."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.pos_drop(x + self.pos_embed)

    def _after_each(self, blocks: nn.Sequential, x: Tensor) -> Iterator[Tensor]:
        """The tokens `[B, N, D]` after each block."""
        recomputes = self.grad_checkpointing and torch.is_grad_enabled()
        for i, block in enumerate(blocks):
            follows = i % self.share_maps > 0
            if not follows and self.share_maps > 1:
                qk = block.shared(x)
            inputs = (x, qk) if follows else (x,)
            x = checkpoint_block(block, *inputs) if recomputes else block(*inputs)
            yield x

    def _norm_of_tokens(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.final_norm == "before_pool" else x

    def set_input_size(self, img_size: Pixels | None = None, patch_size: Pixels | None = None) -> None:
        """Another image or patch size, in pixels: positions and patch kernel are resampled as timm does it."""
        before = self.grid_size
        self.patch_embed.set_input_size(img_size, patch_size)
        if self.grid_size != before:
            resized = resample_abs_pos_embed(self.pos_embed.detach(), list(self.grid_size), list(before))
            self.pos_embed = nn.Parameter(resized, self.pos_embed.requires_grad)
        for feature in self.feature_info:
            feature["reduction"] = self.patch_embed.feat_ratio()
        self.config |= {"img_size": plain(self.img_size), "patch_size": plain(self.patch_size)}
        self._traits = {**getattr(self, "_traits", {}), "img_size": self.img_size}  # what timm takes for current
        if hasattr(self, "pretrained_cfg"):
            self.pretrained_cfg["input_size"] = self.input_size

    @property
    def _model_args(self) -> dict[str, Any]:
        """What timm's `save_for_hf` writes to rebuild the model; it adds `global_pool` itself."""
        return {name: value for name, value in self.config.items() if name != "pool"}

    @_model_args.setter
    def _model_args(self, given: Mapping[str, Any]) -> None:
        """timm's factory notes its keywords; `.config` has them already."""

    def freeze(self, part: int | Literal["backbone"]) -> None:
        """Keeps the stem and the first `part` blocks ("backbone": all but the head) as they are: without gradients, and
        in eval mode whatever mode the rest is in, so that nothing is dropped and no statistics move."""
        whole = part == "backbone"
        if not whole and not 0 <= part <= len(self.blocks):
            raise UserError(f"freeze={part} does not fit: give 0 (the stem alone) to {len(self.blocks)}, or backbone.")
        self._frozen = [self.patch_embed, self.pos_drop, *self.blocks[:None if whole else part],
                        *([self.norm, self.pre_logits] if whole else [])]
        kept = nn.ModuleList(self._frozen)
        for tensor in (self.cls_token, self.pos_embed, *kept.parameters()):
            tensor.requires_grad_(False)
        for norm in kept.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.track_running_stats = False  # nor are they recomputed for an average
        self.train(self.training)

    def train(self, mode: bool = True) -> "ViT":
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` (0: none). `global_pool`: see `pool_of`."""
        if global_pool is not None:
            self.pool = pool_of(global_pool)
        self.num_classes = num_classes
        self.config |= {"num_classes": num_classes, "pool": self.pool}
        self.head = _head(self.head_hidden_size, num_classes).to(self.cls_token.device, self.cls_token.dtype)
        init_weights(self.head, self.config["init_std"])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's rule for layer-wise learning rates: stem, then one group a block, then the rest."""
        return {"stem": r"^cls_token|pos_embed|patch_embed",
                "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


def pool_of(global_pool: str) -> str:
    """Our name of timm's pooling: "token", "avg", "" (none), or one of `POOLS`."""
    pool = {"token": "cls"}.get(global_pool, global_pool)
    if pool not in POOLS:
        raise UserError(f"global_pool='{global_pool}' is not known: choose from token, "
                        f"{', '.join(filter(None, POOLS))}, or '' for none.")
    return pool


def _attention(rule: Mapping[str, Any], dim: int, shared: Mapping[str, Any], block_index: int, depth: int) -> Attention:
    """An attention by its rule; its place goes to a class with parameters `block_index` or `depth`."""
    options = {name: value for name, value in rule.items() if name not in ("class", "name")}
    cls = choose("attention.class", rule.get("class", ""), ATTENTIONS)
    return cls(dim, **{**shared, **options, **_wanted(cls, block_index=block_index, depth=depth)})


def _wanted(cls: type, **offered: Any) -> dict[str, Any]:
    """Those of `offered` that the constructor has parameters for."""
    return {name: value for name, value in offered.items() if name in inspect.signature(cls).parameters}


def _block_indices(chosen: Sequence[int] | str | None, depth: int) -> set[int]:
    """Indices from `[11, -1]` or the slice `"-12:"`; all blocks for None."""
    blocks = range(depth)
    if chosen is None:
        return {*blocks}
    try:
        part = (blocks[slice(*(int(end) if end else None for end in chosen.split(":")))] if isinstance(chosen, str)
                else [blocks[index] for index in chosen])
        return {part[0], *part}  # IndexError where it holds no block
    except (ValueError, TypeError, IndexError):
        raise UserError(f"reattention_blocks={chosen} does not fit a model of {depth} blocks: give a slice such as "
                        f"'-12:', or a list of indices from 0 to {depth - 1} (or negative from the end).") from None


def _head(features: int, num_classes: int) -> nn.Module:
    return nn.Linear(features, num_classes) if num_classes else nn.Identity()
