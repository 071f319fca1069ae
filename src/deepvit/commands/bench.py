"""Speed and memory against peers, as tables and JSON."""

import inspect
import json
import logging
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import torch

from deepvit.bench import attention, loader, models, rows, startup, timing, training
from deepvit.commands.main import parser_of
from deepvit.config.records import read_json_lines
from deepvit.config.signature import check_range
from deepvit.errors import DONE, Failure, UserError, reason

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
    "scaling": models.growth}
OPTIONS = "seconds", "depth", "batch", "data", "cifar10", "compiled"  # that some benches take


def main(arguments: Sequence[str]) -> int:
    parser = parser_of("bench")
    parser.add_argument("benches", nargs="+", choices=[*BENCHES, "all"], metavar="BENCH",
                        help=f"{', '.join(BENCHES)}, or all (without forecast; loader with --data, imagenet on a GPU)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="to spend on each bench (attention, scaling: on each case)")
    parser.add_argument("--depth", type=int, help="blocks of the models (default 32)")
    parser.add_argument("--batch", type=int, help="images (default: CPU 4, memory 8, small 32; GPU 256, small 512)")
    parser.add_argument("--data", help="a folder of JPEGs, for the loader")
    parser.add_argument("--cifar10", help="its folder, for the small model (default: the built-in digits)")
    parser.add_argument("--compile", dest="compiled", action="store_true", help="torch.compile the models")
    parser.add_argument("--json", type=Path, help="add the rows to this file too, a line for each once it is known")
    given = parser.parse_args(arguments)
    _check(given)
    # Of all: neither hours of ImageNet on a CPU, nor the loader without files, nor the long `forecast`
    without = {"forecast", *([] if given.data else ["loader"]), *([] if given.device == "cuda" else ["imagenet"])}
    chosen = [name for name in BENCHES if name not in without] if "all" in given.benches else given.benches
    on, where = rows.made_on(given.device), rows.provenance(given.device)
    rows.append(given.json, "provenance", where)
    print(json.dumps(where), flush=True)
    results = {}
    for name in chosen:
        try:
            results[name] = measure(name, given, on) if len(chosen) == 1 else timing.apart(measure, name, given, on)
        except BrokenProcessPool:  # killed, most often for its memory; its rows up to then are in the file
            results[name] = [{"case": name, "on": on, "name": "all of it", "failed": "its process was killed"}]
            rows.append(given.json, name, results[name][0])
        print(f"\n{rows.tables(results[name])}", flush=True)
    judged = rows.against_targets(results, given.device)
    if judged:
        print(f"\nagainst the targets\n\n{rows.table(judged)}")
    failed = [row for found in results.values() for row in found if "failed" in row]
    if failed:
        raise Failure(f"{len(failed)} rows have no figures, the first of them because of: {failed[0]['failed']}.")
    return DONE


def _check(given: Namespace) -> None:
    """Before the machine is measured, which takes a while."""
    for option, least, most in (("seconds", 0, 1e6), ("depth", 1, 10_000), ("batch", 1, 1_000_000)):
        if getattr(given, option) is not None:
            check_range(f"--{option}", getattr(given, option), least, most)
    if given.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device: check the driver, or leave it out.")
    if "loader" in given.benches and given.data is None:
        raise UserError("The loader benchmark needs JPEGs: give --data FOLDER.")
    lines = read_json_lines(given.json) if given.json else []
    if given.json and given.json.is_file() and given.json.stat().st_size and not (lines and "bench" in lines[0]):
        raise UserError(f"--json {given.json} is there already and holds other things than rows of a bench: give "
                        f"another file.")
    for option in ("data", "cifar10"):
        folder = getattr(given, option)
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"--{option} {folder} is not a folder: check the path.")
    for name in sorted({*given.benches} - {"all"}):
        if idle := [f"--{option.replace('compiled', 'compile')}" for option in OPTIONS if getattr(given, option)
                    and option not in inspect.signature(BENCHES[name]).parameters]:
            print(f"No effect on {name}: {', '.join(idle)}.", file=sys.stderr)


def measure(name: str, given: Namespace, on: str) -> list[dict]:
    """The rows of one bench, each with what it was made `on` and added to the file `given.json` as soon as it is known.
    An error that ends the bench is its last row."""
    logging.basicConfig(level=logging.WARNING)
    found = []
    for row in _until_it_fails(name, given):
        found.append({"case": row.pop("case"), "on": on, **row})
        rows.append(given.json, name, found[-1])
    return found


def _until_it_fails(name: str, given: Namespace) -> Iterator[dict]:
    options = {option: value for option, value in vars(given).items()
               if value is not None and option in inspect.signature(BENCHES[name]).parameters}
    try:
        yield from BENCHES[name](**options)
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        yield {"case": name, "name": "all that was to follow", "failed": reason(error)}
