"""Tensors in, tensors out: the attention operations. `reference` says what they mean."""

from deepvit.ops.reference import HeadNorm, exchange_heads, mix_heads, reattention, softmax_maps

__all__ = ["HeadNorm", "exchange_heads", "mix_heads", "reattention", "softmax_maps"]
