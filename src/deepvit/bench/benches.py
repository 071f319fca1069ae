"""The benches by name, each as rows with a `case`."""

import argparse
import inspect
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator
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
    """What `all` means: neither hours of ImageNet on a CPU, nor the loader without files, nor the long `forecast`."""
    without = {"forecast", *([] if given.data else ["loader"]), *([] if given.device == "cuda" else ["imagenet"])}
    return [name for name in BENCHES if name not in without]


def measure(name: str, given: argparse.Namespace, on: str) -> list[dict]:
    """The rows of one bench, each with what it was made `on` and added to the file `given.json` as soon as it is known.
    An error that ends the bench is its last row."""
    logging.basicConfig(level=logging.WARNING)
    found = []
    for row in _until_it_fails(name, given):
        found.append({"case": row.pop("case"), "on": on, **row})
        rows.append(given.json, name, found[-1])
    return found


def _until_it_fails(name: str, given: argparse.Namespace) -> Iterator[dict]:
    options = {option: value for option, value in vars(given).items()
               if value is not None and option in inspect.signature(BENCHES[name]).parameters}
    try:
        yield from BENCHES[name](**options)
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        yield {"case": name, "name": "all that was to follow", "failed": reason(error)}
