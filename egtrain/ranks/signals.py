"""The signals that ask a process to stop, and how a run and its ranks take them."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from egtrain.progress import show_cursor
from egtrain.ranks.torchrun import OUTCOMES, is_alive, rank, started_by_torchrun

ONE_REQUEST_SECONDS = 2.0
"""Signals within this time are one request: a terminal and a launcher both deliver Ctrl-C."""


@contextmanager
def stop_signals(first: Callable[[], object], second: Callable[[int], object]) -> Iterator[None]:
    """Within the block, call `first()` at SIGTERM, Ctrl-C or SIGHUP, then `second(number)`.

    A process started to ignore Ctrl-C or SIGHUP, as in the background of a script or by nohup, goes
    on ignoring it.
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


class StoppedEarly(BaseException):
    """A signal before the training; no Exception, since many imports catch those.

    Nor a KeyboardInterrupt: if one has passed through `exec`, Python ends by a signal, whatever the
    exit code.
    """


def _end_at_once(number: int) -> NoReturn:
    show_cursor()
    os._exit(128 + number)


class StopSignal:
    """Turns SIGTERM, Ctrl-C and SIGHUP into a request to stop; a second one ends the process.

    The loop sees the request after the step. A rank whose torchrun or launcher has died also asks
    to stop. Before `training` is set, a single process stops at once, with StoppedEarly; ranks go
    on to their first step, so that they stop together.
    """

    def __init__(self) -> None:
        self.training = started_by_torchrun()
        self._parent = os.getppid()
        self._launcher: int | None = None
        self._asked = False
        self._signals = ExitStack()

    def __call__(self) -> bool:
        """Return whether the run was asked to stop."""
        return self._asked or self._abandoned()

    def __enter__(self) -> "StopSignal":
        self._signals.enter_context(stop_signals(self._ask, _end_at_once))
        # Only now: the launcher must find a process that is ready for its signal, or leave a note.
        if folder := os.environ.get(OUTCOMES):
            Path(folder, f"rank-{rank()}").write_text(str(os.getpid()))
            Path(folder, "exit").unlink(missing_ok=True)
            self._launcher = int(Path(folder, "launcher").read_text())
            self._asked |= Path(folder, "stop").exists()
        return self

    def __exit__(self, *_: object) -> None:
        self._signals.close()

    def _abandoned(self) -> bool:
        if not started_by_torchrun():
            return False
        return os.getppid() != self._parent or (
            self._launcher is not None and not is_alive(self._launcher)
        )

    def _ask(self) -> None:
        self._asked = True
        if not self.training:
            raise StoppedEarly
