"""What a run prints. Its reader may leave (`| head`): the run goes on without one."""

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
        _discard(stream or sys.stdout)


def _discard(stream: TextIO) -> None:
    """Sends whatever else is written to `stream` nowhere."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def print_any_name() -> None:
    """Prints what the terminal's encoding lacks with escapes, where Python would stop."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with suppress(OSError):  # the file under it was changed, and cannot be sought in
                stream.reconfigure(errors="backslashreplace")


class _Console(logging.StreamHandler):
    """Standard output as it is when a line comes: while a bar is drawn, rich's, which prints above the bar."""

    stream = property(lambda self: sys.stdout, lambda self, stream: None)

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            _discard(self.stream)
        else:
            super().handleError(record)


def set_up_logging(rank: int = 0) -> None:
    """Log lines to standard output: all of rank 0's; of the others only errors, with their rank."""
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
