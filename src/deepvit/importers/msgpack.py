"""The part of msgpack that `flax.serialization.to_bytes` writes: nested maps whose leaves are arrays (ext type 1).

Written out here because a reader of that part is small, and every length can be checked against the file.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepvit.errors import UserError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64,
          "int32": torch.int32, "int64": torch.int64}
MAX_NESTING = 32
ARRAY, SCALAR = 1, 3  # flax's ext types; both hold (shape, dtype name, bytes)

# first byte -> (struct of the value that follows)
NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
           0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
# first byte -> (kind, struct of the length that follows)
SIZED = {0xC4: ("bytes", ">B"), 0xC5: ("bytes", ">H"), 0xC6: ("bytes", ">I"),
         0xD9: ("text", ">B"), 0xDA: ("text", ">H"), 0xDB: ("text", ">I"),
         0xDC: ("list", ">H"), 0xDD: ("list", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
         0xC7: ("ext", ">B"), 0xC8: ("ext", ">H"), 0xC9: ("ext", ">I")}
FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


class Malformed(Exception):
    """The bytes are no msgpack of a tree of arrays; turned into a UserError with the file's name by `read`."""


def read(path: Path) -> dict[str, Tensor]:
    """The arrays of a flax tree by path (`Transformer_0/Attention_0/...`); tensors are views of the mapped file.

    Raises:
        UserError: not such a file, or a length in it that the file does not hold.
    """
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        parser = _Parser(content)
        tree = parser.value()
        if parser.at != len(content):
            raise Malformed(f"{len(content) - parser.at} bytes follow its end")
        return dict(_leaves(tree))
    except (Malformed, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is torn or no flax msgpack file ({error}): get it again.") from None


class _Parser:
    def __init__(self, content: mmap.mmap, at: int = 0, end: int | None = None):
        self.content, self.at = content, at
        self.end = len(content) if end is None else end

    def value(self, nesting: int = 0) -> Any:
        if nesting > MAX_NESTING:
            raise Malformed(f"nested more than {MAX_NESTING} deep")
        kind, size = self._head()
        if kind == "value":
            return size
        if kind in ("map", "list") and size > self.end - self.at:
            raise Malformed(f"a {kind} of {size} entries in {self.end - self.at} bytes")
        if kind == "map":
            return self._map(size, nesting)
        if kind == "list":
            return [self.value(nesting + 1) for _ in range(size)]
        return self._ext(size, nesting) if kind == "ext" else self._span(kind, size)

    def _head(self) -> tuple[str, Any]:
        """Kind and size of the next value, or ("value", it) where it is as short as its head."""
        first = self._unpack(">B")
        if first < 0x80 or first >= 0xE0:
            return "value", first if first < 0x80 else first - 0x100
        if first < 0xC0:
            return ("map", first & 0x0F) if first < 0x90 else ("list", first & 0x0F) if first < 0xA0 \
                else ("text", first & 0x1F)
        if first in CONSTANTS:
            return "value", CONSTANTS[first]
        if first in NUMBERS:
            return "value", self._unpack(NUMBERS[first])
        if first in FIXED_EXT:
            return "ext", FIXED_EXT[first]
        if first not in SIZED:
            raise Malformed(f"byte 0x{first:x} begins no value")
        kind, length = SIZED[first]
        return kind, self._unpack(length)

    def _map(self, size: int, nesting: int) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for _ in range(size):
            key = self.value(nesting + 1)
            if not isinstance(key, str) or key in tree:
                raise Malformed("a key that is no text, or twice there")
            tree[key] = self.value(nesting + 1)
        return tree

    def _span(self, kind: str, size: int) -> Any:
        """Text, or for bytes their (start, length) in the file, which need no copy."""
        start = self.at
        if size > self.end - start:
            raise Malformed(f"{size} bytes announced, {self.end - start} left")
        self.at += size
        return self.content[start:self.at].decode() if kind == "text" else (start, size)

    def _ext(self, size: int, nesting: int) -> Tensor:
        code = self._unpack(">b")
        if code not in (ARRAY, SCALAR):
            raise Malformed(f"extension type {code}, which is no array")
        start, _ = self._span("bytes", size)
        parts = _Parser(self.content, start, start + size).value(nesting + 1)
        if not isinstance(parts, list) or len(parts) != 3:
            raise Malformed("an array without shape, type and bytes")
        return self._array(*parts)

    def _array(self, shape: Any, dtype: Any, span: Any) -> Tensor:
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or dtype not in DTYPES \
                or not isinstance(span, tuple):
            raise Malformed(f"an array of shape {str(shape)[:60]} and type {str(dtype)[:20]}")
        start, size = span
        count = math.prod(shape)
        if count * DTYPES[dtype].itemsize != size:
            raise Malformed(f"an array of {shape} in {size} bytes")
        if count == 0:
            return torch.empty(shape, dtype=DTYPES[dtype])
        return torch.frombuffer(self.content, dtype=DTYPES[dtype], count=count, offset=start).view(shape)

    def _unpack(self, form: str) -> Any:
        size = struct.calcsize(form)
        if self.at + size > self.end:
            raise Malformed("it ends within a value")
        (value,) = struct.unpack_from(form, self.content, self.at)
        self.at += size
        return value


def _leaves(tree: Any, prefix: str = ""):
    if isinstance(tree, Tensor):
        yield prefix, tree
    elif isinstance(tree, dict):
        for key, branch in tree.items():
            yield from _leaves(branch, f"{prefix}/{key}" if prefix else key)
    else:
        raise Malformed(f"'{prefix[:80]}' is a {type(tree).__name__}, no array")
