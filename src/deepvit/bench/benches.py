"""The benches by name, each as rows with a `case`."""

import argparse
import inspect
import logging
import traceback
from collections.abc import Callable, Iterable
from functools import partial

from deepvit.bench import attention, loader, models, rows, startup, timing, training
from deepvit.errors import UserError, reason

BENCHES: dict[str, Callable[..., Iterable[dict]]] = {  # each takes the command's options by name
    "ceilings": timing.ceiling_rows,
    "train-step": partial(models.measure, models.TrainStep),
    "eval": partial(models.measure, models.Forward),
    "attention": attention.measure,
    "precision": attention.half_precision_error,
    "memory": models.memory,
    "forecast": training.forecasts,
    "imagenet": models.imagenet,
    "small": training.small_model,
    "loader": loader.measure,
    "listing": startup.listing,
    "startup": startup.commands,
    "scaling": models.growth,
}


def all_of(given: argparse.Namespace) -> list[str]:
    """The benches that `all` means: no hours of ImageNet on a CPU, the loader where there are files for it, and not the
    quarter of an hour of `forecast`."""
    without = {"forecast", *([] if given.data else ["loader"]), *([] if given.device == "cuda" else ["imagenet"])}
    return [name for name in BENCHES if name not in without]


def measure(name: str, given: argparse.Namespace, on: str) -> list[dict]:
    """The rows of one bench, each with what it was made `on` and added to the file `given.json` as soon as it is known.
    An error that ends the bench is its last row."""
    logging.basicConfig(level=logging.WARNING)
    found = []

    def keep(row: dict) -> None:
        row = {"case": row.pop("case"), "on": on, **row}
        found.append(row)
        rows.append(given.json, name, row)

    options = {option: value for option, value in vars(given).items()
               if value is not None and option in inspect.signature(BENCHES[name]).parameters}
    try:
        for row in BENCHES[name](**options):
            keep(row)
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        keep({"case": name, "name": "all that was to follow", "failed": reason(error)})
    return found
