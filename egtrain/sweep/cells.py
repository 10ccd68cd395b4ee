"""A cell on disk, and as a process forked from a server that has imported torch."""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from egtrain.config.files import load_config
from egtrain.config.schema import differences
from egtrain.disk import write_atomically
from egtrain.errors import DivergedError, InterruptedRun, UsageError
from egtrain.sweep.plan import Cell, Plan

PLAN = "sweep.json"
PRELOADED = [
    "egtrain.sweep.server",
    "egtrain.sweep.cells",
    "egtrain.cli",
    "egtrain.session",
    "egtrain.saved_run",
    "torch._dynamo",
]
"""What every cell imports, which takes longer than training a small cell."""


class Status(StrEnum):
    """The status of a cell."""

    waiting = "waiting"
    """Not started, or interrupted: it is continued from its newest checkpoint."""
    done = "done"
    diverged = "diverged"
    failed = "failed"


@dataclass(frozen=True)
class Folder:
    """The folder of a sweep's files."""

    path: Path

    def run(self, cell: Cell) -> Path:
        """Return a cell's run directory."""
        return self.path / "cells" / cell.name

    def log(self, cell: Cell) -> Path:
        """Return the file with the output of a cell's process."""
        return self.path / "logs" / f"{cell.name}.log"

    def failure(self, cell: Cell) -> Path:
        """Return the file that says how a cell failed."""
        return self.path / "failures" / f"{cell.name}.json"

    def claim(self, plan: Plan) -> None:
        """Claim the folder for the plan's sweep; it may hold the same sweep with other cells.

        Raises:
            UsageError: it holds another sweep or a run.
        """
        file = self.path / PLAN
        record = plan.as_json(self.path / "cells")
        if file.exists():
            try:
                before = json.loads(file.read_text(encoding="utf-8"))
                _refuse_changes(before["identity"], plan.identity, self.path)
                for part in ("presets", "lr_scaling", "precision", "cells"):
                    record["identity"][part] = {
                        **before["identity"][part],
                        **record["identity"][part],
                    }
                record["commands"] = {**before["commands"], **record["commands"]}
            except (ValueError, KeyError, TypeError):
                raise UsageError(f"{file} is damaged: choose another --output") from None
        elif (self.path / "config.yaml").exists():
            raise UsageError(f"{self.path} holds a run: choose another --output")
        for folder in ("cells", "logs", "failures"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        write_atomically(file, f"{json.dumps(record, indent=1)}\n".encode())

    def status(self, cell: Cell) -> Status:
        """Return the status of a cell.

        Raises:
            UsageError: another run is in its place.
        """
        run = self.run(cell)
        if (run / "config.yaml").exists():
            found = load_config(run / "config.yaml")
            if other := differences(cell.config, found):
                raise UsageError(f"{run} holds another run ({'; '.join(other)}): move it away")
            if (run / "summary.json").exists():
                final = json.loads((run / "summary.json").read_text(encoding="utf-8"))["final"]
                finite = all(
                    value is not None for metrics in final.values() for value in metrics.values()
                )
                return Status.done if finite else Status.diverged
        if self.failure(cell).exists():
            return Status(self.read_failure(cell)["status"])
        return Status.waiting

    def read_failure(self, cell: Cell) -> dict[str, Any]:
        """Return how a cell failed: `status`, `exit_code` and `message`."""
        record: dict[str, Any] = json.loads(self.failure(cell).read_text(encoding="utf-8"))
        return record

    def note_end(self, cell: Cell, exit_code: int) -> Status:
        """Note how a cell's process ended, and return the cell's status."""
        if exit_code == 0:
            self.failure(cell).unlink(missing_ok=True)
            return self.status(cell)
        if exit_code == InterruptedRun.exit_code:
            return Status.waiting
        status = Status.diverged if exit_code == DivergedError.exit_code else Status.failed
        record = {
            "status": status,
            "exit_code": exit_code,
            "message": last_words(self.log(cell), exit_code),
        }
        write_atomically(self.failure(cell), f"{json.dumps(record, indent=1)}\n".encode())
        return status


def last_words(log: Path, exit_code: int) -> str:
    """Return why a process ended, in one line."""
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    with suppress(OSError):
        text = log.read_text(encoding="utf-8", errors="replace")
        if said := [line for line in text.split("\n") if line.strip()]:
            return said[-1].strip().removeprefix("egtrain: ")
    return f"exit code {exit_code}"


def _refuse_changes(before: dict[str, Any], after: dict[str, Any], path: Path) -> None:
    """Raise UsageError if what two sweeps have in common differs."""
    lines = _changes(_common(before, after), _common(after, before))
    if any(line.startswith("cells ") for line in lines):
        lines = [line for line in lines if not line.startswith("cells ")] or [
            "the configurations of its cells"
        ]
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise UsageError(
            f"{path} holds another sweep ({'; '.join(lines[:3])}{more}): undo the change, or "
            "choose another --output"
        )


def _common(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return an identity without the presets and cells that the other one lacks."""
    return {
        part: {name: v for name, v in value.items() if name in other[part]}
        if isinstance(value, dict)
        else value
        for part, value in one.items()
    }


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return what differs between two identities, as `seeds: 3 -> 5`."""
    lines = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += _changes(old, new, f"{prefix}{key} ")
        elif old != new:
            lines.append(f"{prefix}{key}: {_shown(old)} -> {_shown(new)}")
    return lines


def _shown(value: Any) -> str:
    if value is None:
        return "(not there)"
    return value if isinstance(value, str) else json.dumps(value)


# ---- processes


@cache
def process_server() -> BaseContext:
    """Return the context that starts processes, each without anything of the sweep in it."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")  # the system's libraries do not survive a fork
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(PRELOADED)
    return forking


def wait_for_server() -> None:
    """Wait until the server is ready, so that the next process starts at once."""
    process = process_server().Process(target=os.getpid)  # type: ignore[attr-defined]
    process.start()
    process.join()


def start_egtrain(arguments: Sequence[str], gpu: str | None, log: Path) -> BaseProcess:
    """Start `egtrain ARGUMENTS`, on a GPU if one is given; append its output to a log.

    It is asked to stop as soon as the process that started it is gone, for whatever reason.
    """
    process: BaseProcess = process_server().Process(  # type: ignore[attr-defined]
        target=_run, args=(list(arguments), gpu, str(log), str(Path.cwd()), dict(os.environ))
    )
    process.start()
    return process


def _run(
    arguments: list[str], gpu: str | None, log: str, folder: str, environment: dict[str, str]
) -> None:
    os.setsid()  # the terminal's Ctrl-C reaches it only once, through the sweep
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)
    # The server's may be older.
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment if gpu is None else {**environment, "CUDA_VISIBLE_DEVICES": gpu})
    threading.Thread(target=_stop_with_the_sweep, daemon=True).start()
    sys.argv = ["egtrain", *arguments]
    # The sweep has imported it, and runpy would warn of that in every log.
    sys.modules.pop("egtrain.__main__", None)
    runpy.run_module("egtrain", run_name="__main__", alter_sys=True)


def _stop_with_the_sweep() -> None:
    sweep = multiprocessing.parent_process()
    assert sweep is not None
    wait([sweep.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
