"""Whole models of one size: timm's ViT with fused attention, ours, and the published forms of re-attention."""

from collections.abc import Callable
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from deepvit.engine.device import kept_storages
from deepvit.models import ReAttention, create_model
from deepvit.models.cost import forward_flops
from deepvit.ops import reference

BASE, OURS = "timm ViT, fused attention", "deepvit, re-attention"


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
        OURS: lambda: create_model("deepvit32", **sizes),
        "re-attention, published form": lambda: create_model("deepvit32", attention=published, **sizes),
        "re-attention, vit-pytorch's form": lambda: create_model("deepvit32", attention="reattention_ln", **sizes),
    }


class TrainStep:
    """Forward, cross-entropy, backward and a fused AdamW update on one batch that stays where it is; in bfloat16 on a
    GPU, in float32 on a CPU."""

    def __init__(self, make: Callable[[], nn.Module], batch: int, img_size: int, device: str, compiled: bool = False):
        torch.manual_seed(0)
        self.make, self.model = make, make().to(device).train()
        self.called = torch.compile(self.model) if compiled else self.model
        self.x = torch.randn(batch, 3, img_size, img_size, device=device)
        self.y = torch.randint(1000, (batch,), device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.autocast = partial(torch.autocast, device, torch.bfloat16, enabled=device == "cuda")

    def loss(self, network: nn.Module) -> Tensor:
        with self.autocast():
            return nn.functional.cross_entropy(network(self.x).float(), self.y)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.called).backward()
        self.optimizer.step()

    def kept(self) -> list[int]:
        """Bytes of each storage saved for backward, parameters and the batch left out; not compiled."""
        own = *self.model.parameters(), *self.model.buffers(), self.x, self.y
        return kept_storages(lambda: self.loss(self.model), own)

    def flops(self) -> float:
        """Of matrix products: forward, and twice that backward. What is computed again is not counted."""
        return 3 * len(self.x) * forward_flops(self.make, self.x.shape[1:])

    def moved(self) -> float:
        """Bytes at least: what is kept written and read, 7 accesses of each weight and its moments by AdamW."""
        return 2 * sum(self.kept()) + 7 * sum(x.nbytes for x in self.model.parameters())


class Forward(TrainStep):
    """Logits of one batch in eval mode."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.model.eval()
        del self.optimizer

    def __call__(self) -> None:
        with torch.inference_mode(), self.autocast():
            self.called(self.x)

    def flops(self) -> float:
        return super().flops() / 3

    def moved(self) -> float:
        return self.x.nbytes + sum(x.nbytes for x in self.model.parameters())
