"""A cell's process: `egtrain ARGUMENTS`, forked from a server that has imported torch already."""

import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Sequence
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOADED = [
    "egtrain.sweep.detached",
    "egtrain.cli",
    "egtrain.session",
    "egtrain.saved_run",
    "torch._dynamo",
]
"""What every cell imports; it would take longer than a small cell trains."""


@cache
def context() -> BaseContext:
    """Return what makes the processes; each is a clean one, with nothing of the sweep in it."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")  # the system's libraries do not survive a fork
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(PRELOADED)
    return forking


def warm_up() -> None:
    """Wait until the server is ready, so that the next process starts at once."""
    process = context().Process(target=os.getpid)  # type: ignore[attr-defined]
    process.start()
    process.join()


def started_egtrain(arguments: Sequence[str], gpu: str | None, log: Path) -> BaseProcess:
    """Start `egtrain ARGUMENTS` on a GPU, if one is given, with its output at the end of a file.

    It is asked to stop as soon as the process that started it is gone, however that ended.
    """
    process: BaseProcess = context().Process(  # type: ignore[attr-defined]
        target=_run, args=(list(arguments), gpu, str(log), str(Path.cwd()), dict(os.environ))
    )
    process.start()
    return process


def _run(
    arguments: list[str], gpu: str | None, log: str, folder: str, environment: dict[str, str]
) -> None:
    os.setsid()  # the terminal's Ctrl-C reaches it through the sweep only, once
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)
    # The server's own may be older.
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment if gpu is None else {**environment, "CUDA_VISIBLE_DEVICES": gpu})
    threading.Thread(target=_stop_with_the_sweep, daemon=True).start()
    sys.argv = ["egtrain", *arguments]
    sys.modules.pop(
        "egtrain.__main__", None
    )  # from the sweep's own start; runpy would warn in every log
    runpy.run_module("egtrain", run_name="__main__", alter_sys=True)


def _stop_with_the_sweep() -> None:
    sweep = multiprocessing.parent_process()
    assert sweep is not None
    wait([sweep.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
