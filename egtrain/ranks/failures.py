"""Ranks that end together: one's failure is printed once, and the others end within seconds.

The first failure of an attempt is written into torchrun's store, where every rank looks for it.
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
"""Key in torchrun's store, with the attempt's number: the first failure of a rank."""
WATCH_SECONDS = 0.5
"""How often a rank looks whether another one has failed."""


def end_rank(code: int, failure: BaseException | None = None) -> NoReturn:
    """End a rank with its exit code, the others with it, and print a failure once in the run.

    torchrun restarts what fails and returns 1 for every failure. So under the launcher that
    `--nproc` is, an expected failure is noted for it. An interrupted run has not failed.
    """
    if failure is None:
        _leave(code, restart=False)
    expected = isinstance(failure, EgtrainError)
    whose = failure.reported_by if isinstance(failure, EgtrainError) else None
    if whose not in (None, rank()):
        # torchrun would end that rank as soon as this one has ended.
        _wait_for_report(seconds=10)
        _leave(code, restart=False)
    if whose is None and rank():
        # What fails on all, such as a wrong option, is rank 0's to tell.
        _wait_for_report(seconds=1)
    text = str(failure) if expected else ""
    report = {"rank": rank(), "code": code, "restart": not expected, "text": text}
    first = _first_report(report)
    if first is report or (expected and first["text"] != text):
        _print_failure(failure)
    # What happens after the first failure is mostly its consequence: a lost connection.
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
    """Put a report into the store and return the first one of this attempt, or `report` itself."""
    try:
        written = json.dumps(report)
        found = store().compare_set(_failure_key(), "", written).decode()
    except (KeyError, ValueError, RuntimeError):
        return report  # the store is gone with its holder, so nobody else can be told
    first: dict[str, Any] = report if found == written else json.loads(found)
    if first is report and holds_store():
        time.sleep(2 * WATCH_SECONDS)  # it ends with this process, and the others shall see it
    return first


def _wait_for_report(seconds: float) -> None:
    """Wait until some rank has reported a failure."""
    deadline = time.monotonic() + seconds
    with suppress(KeyError, ValueError, RuntimeError):
        while time.monotonic() < deadline and not store().check([_failure_key()]):
            time.sleep(0.05)


def end_when_another_rank_fails(done: threading.Event) -> None:
    """In a thread, until `done`: end this process once another rank has reported a failure."""
    with suppress(RuntimeError):  # torchrun is gone: StopSignal notices it, too
        while not store().check([_failure_key()]):
            if done.wait(WATCH_SECONDS):
                return
        first = json.loads(store().get(_failure_key()))
        if first["rank"] != rank():
            show_cursor()
            _leave(first["code"], first["restart"])


def _leave(code: int, restart: bool) -> NoReturn:
    """End this process, with a code that lets torchrun restart it or not.

    The interpreter is not taken down in order: of six ranks one was seen to abort there, in a
    thread of Gloo's.
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
