"""Tensors in, tensors out: the attention operations. `reference` says what they mean, `reattention` is the fast one."""

from deepvit.ops.affine import fold
from deepvit.ops.dispatch import reattention
from deepvit.ops.reference import HeadNorm, batch_norm, exchange_heads, mix_heads, softmax_maps

__all__ = ["HeadNorm", "batch_norm", "exchange_heads", "fold", "mix_heads", "reattention", "softmax_maps"]
