"""Decodes every image of a data set, and lists those that cannot be used in a file for data.exclude."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from deepvit.commands.cli import quoted, sentences
from deepvit.commands.main import parser_of
from deepvit.config.compose import compose
from deepvit.config.settings import read_group
from deepvit.config.signature import check_range
from deepvit.data import Bad, ImageSet, Transform, eval_batches, source_of
from deepvit.data.source import TITLE, write_list
from deepvit.engine.device import usable_cores
from deepvit.engine.progress import Display
from deepvit.errors import BAD_INPUT, DONE, UserError
from deepvit.run.console import say, set_up_logging

BATCH = 64  # images
PAUSE = 10  # seconds between two lines where there is no terminal
LOOK = Transform((1, 1), lambda image: torch.zeros(3, 1, 1, dtype=torch.uint8))  # what is decoded is not kept


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("check")
    parser.add_argument("data", metavar="DATA", help="folder of classes or of splits of them")
    parser.add_argument("settings", nargs="*", default=[], metavar="SETTING=VALUE",
                        help="such as data=timm data.name=wds/")
    parser.add_argument("--list", type=Path, default=Path("unusable.txt"), help="to write (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes (default: %(default)s)")
    given = parser.parse_args(arguments)
    check_range("--workers", given.workers, 0, 1024)
    if given.list.exists() and not given.list.read_text(errors="replace").startswith(TITLE):
        raise UserError(f"{given.list} exists and is not a list of images: give another file with --list.")
    if not given.list.absolute().parent.is_dir():
        raise UserError(f"--list {given.list} is in a folder that does not exist: create it, or give another file.")
    set_up_logging()
    with sentences():
        config = compose([quoted(word) for word in ("data=folder", f"data.root={given.data}", *given.settings)])
    whole = replace(read_group("data", config["data"]), fraction=1.0, classes=None, exclude=None, in_memory_mb=0)
    sets, found = source_of(whole).sets(), []
    with Display() as display:
        for images in sets:
            found += _unusable(images, given.workers, display)
    count = sum(map(len, sets))
    for bad in found:
        say(f"{bad.name}: {bad.reason}")
    say(f"{count - len(found):,} of {count:,} images can be used.")
    if not found:
        return DONE
    write_list(given.list, [(bad.name, bad.reason) for bad in found], given.data)
    say(f"The others are listed in {given.list}: data.exclude={given.list} leaves them out.")
    return BAD_INPUT


def _unusable(images: ImageSet, workers: int, display: Display) -> list[Bad]:
    found, done, refused, last = [], 0, 0, time.monotonic()
    bar = display.add_task(str(Path(images.name(0)).parent.parent), total=len(images))
    for batch in eval_batches(images, LOOK, batch_size=BATCH, workers=workers, on_error="report"):
        found, done, refused = found + batch.bad, done + len(batch), refused + batch.pil_fallbacks
        display.update(bar, details=[f"{len(found)} bad"])
        display.advance(bar, len(batch))
        if not display.replaces_lines and time.monotonic() - last > PAUSE:
            say(f"{done:,} of {len(images):,} decoded, {len(found)} cannot be used")
            last = time.monotonic()
    display.remove_task(bar)
    if refused:
        say(f"{refused:,} JPEGs are read by PIL only, more slowly.")
    return found
