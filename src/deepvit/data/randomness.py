"""Random numbers that are a function of the sample: of the global generators that timm's and torchvision's transforms
draw from, set and given back, and hashed for many samples at once."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from deepvit.data.stream import stable_hash


def seed_sample(seed: int, epoch: int, index: int, repeat: int) -> None:
    """Python's, numpy's and torch's CPU generator to a function of the sample alone."""
    value = stable_hash("sample", seed, epoch, index, repeat)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.default_generator.manual_seed(value)  # torch.manual_seed would also queue a call per sample for CUDA


@contextmanager
def generators_kept() -> Iterator[None]:
    """Without workers the samples are made in the training process, whose dropout must not see it."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


class Uniforms:
    """Numbers in [0, 1) for b samples at once, a row of them for each: SplitMix64 (Steele et al., OOPSLA 2014), started
    from a hash of the seed and the sample's words. Every call gives the next ones."""

    STEP = np.uint64(0x9E3779B97F4A7C15)

    def __init__(self, seed: int, *words: np.ndarray):
        self._states = np.full(len(words[0]), stable_hash("sample", seed), np.uint64)  # [b]
        for word in words:
            self._states = self._mixed(self._states + word.astype(np.uint64) * self.STEP)
        self._taken = 0

    def __len__(self) -> int:
        return len(self._states)

    def take(self, *shape: int) -> np.ndarray:
        """float64 [b, *shape]."""
        count = math.prod(shape)
        numbers = np.arange(self._taken + 1, self._taken + count + 1, dtype=np.uint64)
        self._taken += count
        bits = self._mixed(self._states[:, None] + numbers * self.STEP)  # [b, count]
        return ((bits >> np.uint64(11)) * 2.0**-53).reshape(-1, *shape)

    def below(self, end: np.ndarray | int) -> np.ndarray:
        """Whole numbers 0 .. end - 1, int64 [b]."""
        return (self.take() * end).astype(np.int64)

    @staticmethod
    def _mixed(bits: np.ndarray) -> np.ndarray:
        bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return bits ^ bits >> np.uint64(31)
