"""Running the cells of a sweep, some at a time, each in a process of its own; what is finished is
never repeated.
"""

import json
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from egtrain.checkpoint import write_atomically
from egtrain.config.files import load_config
from egtrain.config.schema import differences
from egtrain.errors import DivergedError, EgtrainError, InterruptedRun, UsageError
from egtrain.launch import require_cuda
from egtrain.run_directory import LOCK, RunLock
from egtrain.sweep.cell import started_egtrain
from egtrain.sweep.display import Display
from egtrain.sweep.plan import Cell, Plan, changed

PLAN = "sweep.json"
ORPHAN_SECONDS = 120.0
"""How long a cell that a killed sweep left running may take to save and leave."""
POLL_SECONDS = 0.05


class Status(StrEnum):
    """How a cell stands."""

    waiting = "waiting"
    """Not started, or interrupted: it goes on from its newest checkpoint."""
    done = "done"
    diverged = "diverged"
    failed = "failed"


@dataclass(frozen=True)
class Folder:
    """Where a sweep keeps its files."""

    path: Path

    def run(self, cell: Cell) -> Path:
        """Return a cell's run directory."""
        return self.path / "cells" / cell.name

    def log(self, cell: Cell) -> Path:
        """Return the file that a cell's process prints to."""
        return self.path / "logs" / f"{cell.name}.log"

    def failure(self, cell: Cell) -> Path:
        """Return the file that says how a cell failed."""
        return self.path / "failures" / f"{cell.name}.json"

    def claim(self, plan: Plan) -> None:
        """Make this the folder of the plan's sweep, or one with more or fewer cells of the same
        kind.

        Raises:
            UsageError: it is another sweep's, or a run.
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
        """Return how a cell stands.

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
        """Write down how a cell's process ended, and return how the cell stands now."""
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
    """Return in one line why a process ended."""
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    with suppress(OSError):
        said = [
            line
            for line in log.read_text(encoding="utf-8", errors="replace").split("\n")
            if line.strip()
        ]
        if said:
            return said[-1].strip().removeprefix("egtrain: ")
    return f"exit code {exit_code}"


def _refuse_changes(before: dict[str, Any], after: dict[str, Any], path: Path) -> None:
    """Raise UsageError where what two sweeps have in common is not the same in both."""
    lines = changed(_common(before, after), _common(after, before))
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
    """Return an identity without the presets and cells that another one has not."""
    return {
        part: {name: v for name, v in value.items() if name in other[part]}
        if isinstance(value, dict)
        else value
        for part, value in one.items()
    }


class StopRequest:
    """Notes SIGTERM and Ctrl-C in a `with` block; a second one, later than two seconds, is an order
    to end at once.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self.at_once = False

    def __bool__(self) -> bool:
        return self._first is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif now - self._first > 2:
            self.at_once = True

    @contextmanager
    def watching(self) -> Iterator["StopRequest"]:
        """Take over the signals."""
        previous = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@dataclass
class _Running:
    cell: Cell
    process: BaseProcess
    slot: int
    told_to_stop: bool = False


def start_cell(cell: Cell, folder: Folder, gpu: str | None) -> BaseProcess:
    """Start the process of a cell, from its newest checkpoint where it has one."""
    run = folder.run(cell)
    going_on = (run / "config.yaml").exists()
    arguments = ["train", "--resume", str(run)] if going_on else cell.arguments(run)
    return started_egtrain(arguments, gpu, folder.log(cell))


def run_cells(
    plan: Plan, folder: Folder, *, jobs: int, gpus: Sequence[str], retry: bool, display: Display
) -> None:
    """Run all cells that are not finished, `jobs` at a time; failed ones too with `retry`.

    Raises:
        UsageError: another run is in a cell's place, or there is no GPU for what is left; nothing
            has been started.
        InterruptedRun: a signal came; what was running has saved, and the next call goes on.
    """
    statuses = {cell.name: folder.status(cell) for cell in plan.cells}
    again = [
        cell
        for cell in plan.cells
        if retry and statuses[cell.name] in (Status.failed, Status.diverged)
    ]
    waiting = deque(
        cell for cell in plan.cells if statuses[cell.name] is Status.waiting or cell in again
    )
    if waiting and plan.cells[0].config.device == "cuda":
        require_cuda()
    for cell in again:
        folder.failure(cell).unlink(missing_ok=True)
        statuses[cell.name] = Status.waiting
    for cell in waiting:
        if (folder.run(cell) / LOCK).exists():
            with RunLock(folder.run(cell), patience_seconds=ORPHAN_SECONDS):
                pass
    for cell in plan.cells:
        if statuses[cell.name] is not Status.waiting:
            display.skipped(cell, statuses[cell.name])
    running: list[_Running] = []
    with StopRequest().watching() as stop:
        try:
            while running or (waiting and not stop):
                while waiting and not stop and len(running) < jobs:
                    slot = min(set(range(jobs)) - {other.slot for other in running})
                    cell = waiting.popleft()
                    process = start_cell(cell, folder, gpus[slot % len(gpus)] if gpus else None)
                    running.append(_Running(cell, process, slot))
                    display.started(cell, folder.run(cell))
                for one in list(running):
                    if stop and not one.told_to_stop:
                        one.told_to_stop = True
                        one.process.terminate()
                    if stop.at_once:
                        one.process.kill()
                    code = one.process.exitcode
                    if code is not None:
                        running.remove(one)
                        if stop and code < 0:
                            code = InterruptedRun.exit_code  # stopped before it could save
                        statuses[one.cell.name] = folder.note_end(one.cell, code)
                        display.ended(one.cell, statuses[one.cell.name])
                display.refresh()
                time.sleep(POLL_SECONDS)
        finally:
            # Only after an unexpected failure is something left here.
            for one in running:
                one.process.terminate()
            for one in running:
                one.process.join()
    left = sum(status is Status.waiting for status in statuses.values())
    if left:
        over = len(statuses) - left
        raise InterruptedRun(
            f"interrupted with {over} of {len(statuses)} cells finished: the same command goes on"
        )


def devices_for(plan: Plan, jobs: str) -> tuple[int, list[str]]:
    """Return how many cells run at a time for `--jobs`, a number or `auto`, and the GPUs that they
    take in turn.

    Raises:
        UsageError: `jobs` is neither.
    """
    from egtrain.build import cores

    if jobs != "auto" and not (jobs.isdecimal() and int(jobs) > 0):
        raise UsageError(f"--jobs must be a number of processes or auto, not {jobs!r}")
    gpus: list[str] = []
    if plan.cells[0].config.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        import torch

        gpus = [g for g in visible.split(",") if g] or [
            str(gpu) for gpu in range(torch.cuda.device_count())
        ]
    threads = max(cell.config.threads or 1 for cell in plan.cells)
    most = len(gpus) or max(1, cores() // threads)
    return min(most if jobs == "auto" else int(jobs), len(plan.cells)), gpus


def require_success(plan: Plan, folder: Folder) -> None:
    """Raise EgtrainError where cells have failed."""
    failed = [cell for cell in plan.cells if folder.status(cell) is not Status.done]
    if failed:
        names = ", ".join(cell.name for cell in failed[:3]) + (
            " and others" if len(failed) > 3 else ""
        )
        raise EgtrainError(
            f"{len(failed)} of {len(plan.cells)} cells failed ({names}): see "
            f"{folder.path / 'logs'}; "
            "--retry runs them again"
        )
