"""Shared by all tests: one thread (two cores are often shared), `gpu` tests skipped without a GPU."""

from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parent / "data"


def pytest_configure():
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
