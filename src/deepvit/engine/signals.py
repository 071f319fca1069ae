"""Requests to stop. The handler only sets a flag: saving inside a signal handler can hang."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def handled_signals() -> list[signal.Signals]:
    """Those that ask to stop, but for SIGHUP where this process was started to ignore it, as by `nohup`."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *hangup]


class StopRequest:
    """Falsy until one of `handled_signals` arrives; `name` is then the signal's."""

    name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listens for requests to stop; the earlier handlers come back at the end."""
    request = StopRequest()
    earlier = {number: signal.signal(number, request.receive) for number in handled_signals()}
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
