"""What a run prints. Its reader may leave (`| head`): then nobody reads on, and the run goes on."""

import logging
import os
import sys
from contextlib import suppress
from typing import TextIO


def say(sentence: str, stream: TextIO | None = None) -> None:
    """Prints a line at once."""
    try:
        print(sentence, file=stream, flush=True)
    except BrokenPipeError:
        _drop(stream or sys.stdout)


def print_any_name() -> None:
    """A name that the terminal's encoding does not know is printed with escapes, where Python would stop."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with suppress(OSError):  # what it stands on was changed beneath it, and cannot be sought in
                stream.reconfigure(errors="backslashreplace")


def _drop(stream: TextIO) -> None:
    """What else is written to `stream` goes nowhere."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


class _Console(logging.StreamHandler):
    """Standard output as it is when a line comes: while a bar is drawn, rich's, which prints above the bar."""

    stream = property(lambda self: sys.stdout, lambda self, stream: None)

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            _drop(self.stream)
        else:
            super().handleError(record)


def set_up_logging(rank: int = 0) -> None:
    """Lines to standard output from rank 0; from the others only what is wrong, with their number."""
    print_any_name()
    logger = logging.getLogger("deepvit")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    console = _Console()
    console.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    console.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logger.addHandler(console)
    logger.setLevel(logging.DEBUG if rank == 0 else logging.INFO)
    logger.propagate = False
