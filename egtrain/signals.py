"""The signals that ask a process to stop."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ONE_REQUEST_SECONDS = 2.0
"""Signals within this time are one request: a terminal and a launcher both deliver Ctrl-C."""


@contextmanager
def stop_signals(first: Callable[[], object], second: Callable[[int], object]) -> Iterator[None]:
    """Call `first()` at SIGTERM, Ctrl-C or the end of the terminal (SIGHUP), and `second(number)`
    at a later request; only in the `with` block.

    A process that was started to ignore Ctrl-C or SIGHUP, as in the background of a script or by
    nohup, goes on ignoring it.
    """
    asked_at: float | None = None

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        if asked_at is None:
            asked_at = time.monotonic()
            first()
        elif time.monotonic() - asked_at > ONE_REQUEST_SECONDS:
            second(number)

    heeded = [signal.SIGTERM] + [
        number
        for number in (signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, receive) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
