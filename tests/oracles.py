"""Reading the oracles in tests/data: what the published codes compute, made by running them (see tests/data/README.md).

Also the synthetic weight rule, by which full-size models are compared without big files.
"""

import gzip
import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "data"


@cache
def oracle(case: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and config of `official/<name>` or `other/<name>`.

    A case is one .npz: the bytes of all float32 numbers, sorted by significance (they compress better so), and a JSON
    index of names and shapes.
    """
    with np.load(DATA / f"{case}.npz", allow_pickle=False) as file:
        numbers = np.ascontiguousarray(file["bytes"].T).view("<f4").ravel()
        index = json.loads(file["index"].tobytes())
    tensors, at = {}, 0
    for name, shape in index["shapes"].items():
        size = math.prod(shape)
        tensors[name] = torch.from_numpy(numbers[at:at + size].reshape(shape))
        at += size
    return tensors, index["config"]


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors below `prefix/`, without it."""
    return {name.removeprefix(f"{prefix}/"): tensor for name, tensor in tensors.items()
            if name.startswith(f"{prefix}/")}


@cache
def keys(name: str) -> dict[str, list[int]]:
    """Exact names and shapes of a published full-size model's weights."""
    return json.loads(gzip.decompress((DATA / "keys.json.gz").read_bytes()))[name]


def uniform(stream: int, count: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1): an integer hash of (stream, position), the same in every framework."""
    mask = np.uint64(0xFFFFFFFF)
    h = (np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(stream * 40503 + 12345)) & mask
    h ^= h >> np.uint64(16)
    h = (h * np.uint64(2246822519)) & mask
    h ^= h >> np.uint64(13)
    h = (h * np.uint64(3266489917)) & mask
    h ^= h >> np.uint64(16)
    return h.astype(np.float64) / 2**32


def synthetic(name: str, shape: list[int], stream: int) -> torch.Tensor:
    """The weight called `name`; `stream` is its place among the sorted names of its state dict."""
    v = 2 * uniform(stream, math.prod(shape)) - 1  # [-1, 1)
    if name.endswith("num_batches_tracked"):
        return torch.ones(shape, dtype=torch.int64)
    if name.endswith("running_mean"):
        v = 0.005 + 0.002 * v if "var_norm" in name else 0.1 * v
    elif name.endswith("running_var"):
        v = 2e-4 * (1 + 0.5 * v) if "var_norm" in name else 1 + 0.5 * v
    elif name in ("pos_embed", "cls_token"):
        v = 0.2 * v
    elif len(shape) == 1:
        v = 1 + 0.1 * v if name.endswith("weight") else 0.1 * v
    else:
        v = v * math.sqrt(3 / math.prod(shape[1:])) * (1.5 if ".qkv." in name else 1.0)
    return torch.from_numpy(v.reshape(shape).astype(np.float32))


def synthetic_state(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: synthetic(name, shapes[name], i) for i, name in enumerate(sorted(shapes))}


def synthetic_images(batch: int = 2, size: int = 224) -> torch.Tensor:
    numbers = 2 * (2 * uniform(1000003, batch * 3 * size * size) - 1)
    return torch.from_numpy(numbers.reshape(batch, 3, size, size).astype(np.float32))
