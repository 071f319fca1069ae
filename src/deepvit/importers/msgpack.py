"""What `flax.serialization.to_bytes` writes: msgpack of nested maps whose leaves are arrays."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepvit.errors import UserError, reason

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64,
          "int32": torch.int32, "int64": torch.int64}
MAX_NESTING = 32
ARRAY, SCALAR = 1, 3  # flax's ext types; both hold (shape, dtype name, bytes)
MAX_LIST = 8  # of flax's lists, such as a shape; msgpack reserves what a length announces


def read(path: Path) -> dict[str, Tensor]:
    """The arrays of a flax tree by path (`Transformer_0/Attention_0/...`).

    Raises:
        UserError: not such a file, a length in it that the file does not hold, or msgpack is not installed.
    """
    try:
        from msgpack import unpackb
    except ImportError:
        raise UserError(f"{path} is a flax msgpack file, which needs msgpack: pip install 'deepvit[flax]'.") from None

    def array(code: int, content: bytes) -> Tensor:
        if code not in (ARRAY, SCALAR):
            raise ValueError(f"extension type {code}, which is no array")
        return _array(unpackb(content, max_array_len=MAX_LIST))

    try:
        tree = unpackb(path.read_bytes(), ext_hook=array, object_pairs_hook=_branch, max_array_len=MAX_LIST)
        return dict(_leaves(tree))
    except (ValueError, TypeError) as error:  # msgpack's own are among them
        raise UserError(f"{path} is torn or no flax msgpack file ({reason(error)}): get it again.") from None


def _branch(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs) or not all(isinstance(key, str) for key in tree):
        raise ValueError("a key that is no text, or twice there")
    return tree


def _array(parts: Any) -> Tensor:
    if not isinstance(parts, list) or len(parts) != 3:
        raise ValueError("an array without shape, type and bytes")
    shape, dtype, content = parts
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or dtype not in DTYPES \
            or not isinstance(content, bytes) or math.prod(shape) * DTYPES[dtype].itemsize != len(content):
        raise ValueError(f"an array of shape {str(shape)[:60]} and type {str(dtype)[:20]} that its bytes do not hold")
    if not content:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(bytearray(content), dtype=DTYPES[dtype]).view(shape)


def _leaves(tree: Any, prefix: str = "", nesting: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield prefix, tree
    elif isinstance(tree, dict) and nesting < MAX_NESTING:
        for key, branch in tree.items():
            yield from _leaves(branch, f"{prefix}/{key}" if prefix else key, nesting + 1)
    else:
        raise ValueError(f"'{prefix[:80]}' is a {type(tree).__name__}, no array")
