"""Ranks that end together: a failure is printed once, and the others end within seconds.

The first failure of an attempt is written to torchrun's store, which every rank watches.
"""

import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from egtrain.errors import EgtrainError, InterruptedRun
from egtrain.progress import show_cursor
from egtrain.ranks.torchrun import OUTCOMES, holds_store, rank, restart_count, store

FAILURE_KEY = "egtrain/failure"
"""Key of the first failure in torchrun's store; the attempt's number follows."""
WATCH_SECONDS = 0.5
"""How often a rank checks whether another has failed."""


def end_rank(code: int, failure: BaseException | None = None) -> NoReturn:
    """End a rank with its exit code and the others with it; print a failure once in the run.

    torchrun restarts whatever fails, and returns 1 for every failure. So an expected failure is
    noted for the launcher of `--nproc`, if there is one. An interrupted run has not failed.
    """
    if failure is None:
        _leave(code, restart=False)
    expected = isinstance(failure, EgtrainError)
    whose = failure.reported_by if isinstance(failure, EgtrainError) else None
    if whose not in (None, rank()):
        # torchrun would end that rank as soon as this one ends.
        _wait_for_report(seconds=10)
        _leave(code, restart=False)
    if whose is None and rank():
        # Rank 0 reports what fails on all, such as a wrong option.
        _wait_for_report(seconds=1)
    text = str(failure) if expected else ""
    report = {"rank": rank(), "code": code, "restart": not expected, "text": text}
    first = _first_report(report)
    if first is report or (expected and first["text"] != text):
        _print_failure(failure)
    # Later failures mostly follow from the first: a lost connection.
    _leave(first["code"], first["restart"])


def _print_failure(failure: BaseException) -> None:
    where = f"rank {rank()}: " if rank() else ""
    if isinstance(failure, EgtrainError):
        print(f"egtrain: {where}{failure}", file=sys.stderr)
    else:
        print(f"egtrain: {where}an unexpected failure", file=sys.stderr)
        sys.excepthook(type(failure), failure, failure.__traceback__)


def _failure_key() -> str:
    return f"{FAILURE_KEY}/{restart_count()}"


def _first_report(report: dict[str, Any]) -> dict[str, Any]:
    """Put a report into the store; return the first one of this attempt, or else `report`."""
    try:
        written = json.dumps(report)
        found = store().compare_set(_failure_key(), "", written).decode()
    except (KeyError, ValueError, RuntimeError):
        return report  # the store has gone with its holder, so no other rank can be told
    first: dict[str, Any] = report if found == written else json.loads(found)
    if first is report and holds_store():
        time.sleep(2 * WATCH_SECONDS)  # the store ends with this process, and others read it
    return first


def _wait_for_report(seconds: float) -> None:
    """Wait until some rank has reported a failure."""
    deadline = time.monotonic() + seconds
    with suppress(KeyError, ValueError, RuntimeError):
        while time.monotonic() < deadline and not store().check([_failure_key()]):
            time.sleep(0.05)


def end_when_another_rank_fails(done: threading.Event) -> None:
    """Until `done`, in a thread: end this process once another rank has reported a failure."""
    with suppress(RuntimeError):  # torchrun is gone: StopSignal notices it too
        while not store().check([_failure_key()]):
            if done.wait(WATCH_SECONDS):
                return
        first = json.loads(store().get(_failure_key()))
        if first["rank"] != rank():
            show_cursor()
            _leave(first["code"], first["restart"])


def _leave(code: int, restart: bool) -> NoReturn:
    """End this process, with a code that lets torchrun restart it or not.

    The interpreter is not shut down in order: a rank was seen to abort there, in a thread of Gloo.
    """
    if (folder := os.environ.get(OUTCOMES)) and not restart:
        if code:
            with suppress(OSError):
                Path(folder, "exit").write_text(str(code))
        code = 0
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(0 if code == InterruptedRun.exit_code else code)
