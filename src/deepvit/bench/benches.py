"""The benches by name, each as rows with a `case`."""

import argparse
import logging
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from deepvit.bench import attention, ceilings, forecast, listing, loader, memory, models, rows, scaling, small, startup
from deepvit.bench.timing import reason
from deepvit.errors import UserError

BENCHES: dict[str, Callable[[argparse.Namespace], Iterable[dict]]] = {
    "ceilings": lambda given: ceilings.measure(given.device),
    "train-step": lambda given: models.train_step(given.device, **_given(given, "depth", "batch", "seconds"),
                                                  compiled=given.compile),
    "eval": lambda given: models.evaluation(given.device, **_given(given, "depth", "batch", "seconds"),
                                            compiled=given.compile),
    "attention": lambda given: attention.measure(given.device, **_given(given, "batch", "seconds")),
    "precision": lambda given: [{"case": "op under bf16 autocast at initialisation, against float64", **row}
                                for row in attention.half_precision_error(device=given.device)],
    "memory": lambda given: memory.measure(given.device, **_given(given, "depth", "batch")),
    "forecast": lambda given: forecast.measure(given.device, **_given(given, "depth", "batch")),
    "imagenet": lambda given: models.imagenet(given.device, **_given(given, "depth", "batch", "seconds"),
                                              compiled=given.compile),
    "small": lambda given: small.measure(given.device, **_given(given, "depth", "batch", "cifar10"),
                                         compiled=given.compile),
    "loader": lambda given: [{"case": row.pop("task"), **row}
                             for row in loader.measure(_data(given), **_given(given, "seconds"))],
    "listing": lambda given: listing.measure(),
    "startup": lambda given: startup.measure(),
    "scaling": lambda given: scaling.measure(given.device, **_given(given, "depth", "batch", "seconds")),
}


def all_of(given: argparse.Namespace) -> list[str]:
    """The benches that `all` means: no hours of ImageNet on a CPU, the loader where there are files for it, and not the
    quarter of an hour of `forecast`."""
    without = {"forecast", *([] if given.data else ["loader"]), *([] if given.device == "cuda" else ["imagenet"])}
    return [name for name in BENCHES if name not in without]


def _given(given: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(given, name) for name in names if getattr(given, name) is not None}


def _data(given: argparse.Namespace) -> str:
    if given.data is None:
        raise UserError("The loader is measured on your JPEGs: give --data FOLDER.")
    return given.data


def measure(name: str, given: argparse.Namespace, on: str) -> list[dict]:
    """The rows of one bench, each of which `given.json` holds once it is known; what ends it is the last of them. Each
    says what it was made `on`."""
    logging.basicConfig(level=logging.WARNING)
    found = []

    def keep(row: dict) -> None:
        row = {"case": row.pop("case"), "on": on, **row}
        found.append(row)
        rows.append(given.json, name, row)

    try:
        for row in BENCHES[name](given):
            keep(row)
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        keep({"case": name, "name": "all that was to follow", "failed": reason(error)})
    return found
