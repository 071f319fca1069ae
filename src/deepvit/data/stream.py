"""The order of the images, a pure function of (seed, step, position) whatever the workers, ranks or restarts; and the
random seed of each sample, a function of (seed, epoch, index, repeat). The training data is an endless row of epochs,
each a permutation. Step s takes the places [s * u, (s + 1) * u) of it, u = batch_size / repeats, so every batch is full
and nothing is dropped; an epoch need not be whole steps. With repeats (DeiT's), position b of a batch is repeat b // u
of image b % u, and an epoch uses n // repeats images."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch


def stable_hash(*words: int | str) -> int:
    """63 bits from the words; the same on every machine and in every process."""
    text = ",".join(map(str, words)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def epoch_steps(n: int, batch_size: int, repeats: int = 1) -> float:
    """Steps of one epoch over n images."""
    return max(1, n // repeats) * repeats / batch_size


@lru_cache(maxsize=3)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the n images in an epoch, int64 [n]."""
    generator = torch.Generator().manual_seed(stable_hash("order", seed, epoch))
    return torch.randperm(n, generator=generator).numpy()


@dataclass(frozen=True)
class Draw:
    """The samples of one micro-batch; all int64 [b]."""

    epochs: np.ndarray
    indices: np.ndarray
    repeats: np.ndarray


def draw(n: int, seed: int, step: int, positions: np.ndarray, batch_size: int, repeats: int = 1) -> Draw:
    """The samples at these positions of the global batch of a step."""
    unique, per_epoch = batch_size // repeats, max(1, n // repeats)
    places = step * unique + positions % unique  # int64 [b], in the endless row
    epochs, offsets = places // per_epoch, places % per_epoch
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = permutation(n, seed, int(epoch))[offsets[here]]
    return Draw(epochs, indices, positions // unique)


@dataclass(frozen=True)
class Stream:
    """One rank's micro-batches, all of one size: `accumulation` of them for each step in [start_step, steps)."""

    n: int  # images
    seed: int
    batch_size: int  # of all ranks together; rank r gets the r-th contiguous part
    steps: int
    start_step: int = 0
    rank: int = 0
    world: int = 1
    accumulation: int = 1
    repeats: int = 1  # times that an image appears in its batch

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[Draw]:
        share = self.batch_size // self.world
        micro = share // self.accumulation
        for step in range(self.start_step, self.steps):
            for part in range(self.accumulation):
                first = self.rank * share + part * micro
                yield draw(self.n, self.seed, step, np.arange(first, first + micro), self.batch_size, self.repeats)


def seed_sample(seed: int, epoch: int, index: int, repeat: int) -> None:
    """Seeds the generators that timm's and torchvision's transforms draw from: Python's, numpy's, torch's."""
    value = stable_hash("sample", seed, epoch, index, repeat)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.default_generator.manual_seed(value)  # torch.manual_seed would also queue a call per sample for CUDA


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restores the global generators: without workers, samples are made in the process that draws dropout."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
