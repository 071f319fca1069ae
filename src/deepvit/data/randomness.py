"""The global random generators that timm's and torchvision's transforms draw from, set per sample and given back."""

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
