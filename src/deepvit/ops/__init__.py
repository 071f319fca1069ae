"""Tensors in, tensors out: the attention operations. `reference` defines them, `reattention` is fast."""

from deepvit.ops.affine import fold
from deepvit.ops.core import reattention
from deepvit.ops.reference import HeadNorm, batch_norm, contrast, exchange_heads, is_plain, mix_heads, softmax_maps

__all__ = ["HeadNorm", "batch_norm", "contrast", "exchange_heads", "fold", "is_plain", "mix_heads", "reattention",
           "softmax_maps"]
