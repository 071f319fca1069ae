"""The benches by name, each as rows with a `case`."""

import argparse
import logging
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from deepvit.bench import attention, listing, loader, memory, models, scaling, startup
from deepvit.errors import UserError

BENCHES: dict[str, Callable[[argparse.Namespace], list[dict]]] = {
    "train-step": lambda given: models.train_step(given.device, **_sizes(given), **_seconds(given),
                                                  compiled=given.compile),
    "eval": lambda given: models.evaluation(given.device, **_sizes(given), **_seconds(given), compiled=given.compile),
    "attention": lambda given: attention.measure(given.device, **_seconds(given)),
    "precision": lambda given: [{"case": "op under bf16 autocast at initialisation, against float64", **row}
                                for row in attention.half_precision_error(device=given.device)],
    "memory": lambda given: memory.measure(given.device, **_sizes(given)),
    "loader": lambda given: [{"case": row.pop("task"), **row}
                             for row in loader.measure(_data(given), **_seconds(given))],
    "listing": lambda given: listing.measure(),
    "startup": lambda given: startup.measure(given.device),
    "scaling": lambda given: scaling.measure(given.device, **_seconds(given)),
}


def _sizes(given: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(given, name) for name in ("depth", "batch") if getattr(given, name) is not None}


def _seconds(given: argparse.Namespace) -> dict[str, float]:
    return {} if given.seconds is None else {"seconds": given.seconds}


def _data(given: argparse.Namespace) -> str:
    if given.data is None:
        raise UserError("The loader is measured on your JPEGs: give --data FOLDER.")
    return given.data


def measure(name: str, given: argparse.Namespace) -> list[dict]:
    """One bench, here."""
    logging.basicConfig(level=logging.WARNING)
    return BENCHES[name](given)


def measure_apart(name: str, given: argparse.Namespace) -> list[dict]:
    """One bench in a process of its own: what an allocator keeps from the one before would change its figures."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, name, given).result()
