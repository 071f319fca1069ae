"""What this device reaches at best, measured, and the least time that a piece of work can take there."""

from functools import cache
from typing import NamedTuple

import torch

from deepvit.bench.timing import timed

SIZES = {"cuda": (2**31, 8192), "cpu": (2**27, 1024)}  # bytes of the copy, side of the product
CALLS = 10


class Ceilings(NamedTuple):
    bytes_per_s: float  # read plus written
    flops_per_s: float  # of matrix products: bfloat16 on a GPU, float32 on a CPU

    def floor_ms(self, flops: float, moved: float) -> float:
        """The larger of the times for `flops` operations and for `moved` bytes."""
        return 1e3 * max(flops / self.flops_per_s, moved / self.bytes_per_s)


@cache
def ceilings(device: str) -> Ceilings:
    """By a large copy and a large product, of random numbers (a product of zeros is faster)."""
    nbytes, side = SIZES[device]
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    copy = min(timed(lambda: target.copy_(source), device, CALLS).wall for _ in range(3))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = min(timed(lambda: left @ right, device, CALLS).wall for _ in range(3))
    return Ceilings(2 * nbytes / copy, 2 * side**3 / product)


def measure(device: str = "cpu") -> list[dict]:
    """Rows with `case`, `name` and `reached` (with its unit in the name)."""
    best = ceilings(device)
    kind = "bfloat16" if device == "cuda" else "float32"
    return [{"case": "ceilings", "name": "copy, GB/s read and written", "reached": best.bytes_per_s / 1e9},
            {"case": "ceilings", "name": f"{kind} product, TFLOP/s", "reached": best.flops_per_s / 1e12}]
