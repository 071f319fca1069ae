"""Whole models of one size: timm's ViT with fused attention, ours, and the published forms of re-attention."""

from collections.abc import Callable
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from deepvit.models import ReAttention, create_model
from deepvit.ops import reference

BASE = "timm ViT, fused attention"


class PublishedReAttention(ReAttention):
    """Re-attention as the published code computes it: every map made and kept. A peer to measure, not to use."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        track = self.training and self.track_stats
        return reference.reattention(q, k, v, *self._theta(), norm=self._head_norm(track), scale=self.scale,
                                     map_scale=self.map_scale, dropout_p=self.attn_drop, training=self.training)


def timm_vit(depth: int, img_size: int = 224, **sizes: int) -> nn.Module:
    """timm's ViT with the dimensions of the published models: width 384, 12 heads, MLP ratio 3."""
    return VisionTransformer(img_size=img_size, embed_dim=384, depth=depth, num_heads=12, mlp_ratio=3.0,
                             norm_layer=partial(nn.LayerNorm, eps=1e-6), **sizes)


def contestants(depth: int, img_size: int = 224) -> dict[str, Callable[[], nn.Module]]:
    """Name -> constructor; the first is what the others are compared with."""
    sizes = {"depth": depth, "img_size": img_size}
    published = {"name": "published", "class": "PublishedReAttention", "mix": True, "norm": True}
    return {
        BASE: lambda: timm_vit(**sizes),
        "deepvit, self-attention": lambda: create_model("vit32", **sizes),
        "deepvit, re-attention": lambda: create_model("deepvit32", **sizes),
        "re-attention, published form": lambda: create_model("deepvit32", attention=published, **sizes),
        "re-attention, vit-pytorch's form": lambda: create_model("deepvit32", attention="reattention_ln", **sizes),
    }


class TrainStep:
    """Forward, cross-entropy, backward and a fused AdamW update on one batch that stays where it is."""

    def __init__(self, make: Callable[[], nn.Module], batch: int, img_size: int, device: str,
                 dtype: torch.dtype | None = None, compiled: bool = False):
        torch.manual_seed(0)
        self.model = make().to(device).train()
        self.called = torch.compile(self.model) if compiled else self.model
        self.x = torch.randn(batch, 3, img_size, img_size, device=device)
        self.y = torch.randint(1000, (batch,), device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.autocast = partial(torch.autocast, device, dtype, enabled=dtype is not None)

    def loss(self) -> Tensor:
        with self.autocast():
            return nn.functional.cross_entropy(self.called(self.x).float(), self.y)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()


class Forward(TrainStep):
    """Logits of one batch in eval mode."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.model.eval()
        del self.optimizer

    def __call__(self) -> None:
        with torch.inference_mode(), self.autocast():
            self.called(self.x)
