"""Runs the cells of a sweep, each in a new process, and times a few steps."""

import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event
from typing import TextIO

from egtrain.errors import EgtrainError, InterruptedRun, UsageError
from egtrain.progress import Progress
from egtrain.ranks.distributed import require_cuda
from egtrain.ranks.signals import stop_signals
from egtrain.run_directory import LOCK, RunLock
from egtrain.sweep.cells import Folder, Status, last_words, start_egtrain, wait_for_server
from egtrain.sweep.display import Display, last_metric
from egtrain.sweep.plan import Cell, Plan

ORPHAN_SECONDS = 120.0
"""How long a cell left running by a killed sweep may take to save and exit."""
POLL_SECONDS = 0.05
MEASURED_STEPS = 4
"""For the estimate of the time."""


@dataclass
class _RunningCell:
    cell: Cell
    process: BaseProcess
    slot: int
    told_to_stop: bool = False


def start_cell(cell: Cell, folder: Folder, gpu: str | None) -> BaseProcess:
    """Start the process of a cell, from its newest checkpoint if it has one."""
    run = folder.run(cell)
    started_before = (run / "config.yaml").exists()
    arguments = ["train", "--resume", str(run)] if started_before else cell.arguments(run)
    return start_egtrain(arguments, gpu, folder.log(cell))


def run_cells(
    plan: Plan,
    folder: Folder,
    *,
    jobs: int,
    gpus: Sequence[str],
    retry: bool,
    stream: TextIO,
    go_on: Callable[[], Plan] | None = None,
) -> None:
    """Run all unfinished cells, `jobs` at a time; with `retry`, failed ones too.

    When all have ended, `go_on` returns the plan with those that their results ask for; these run
    next, until there are no more. Progress is shown on the stream.

    Raises:
        UsageError: another run is in a cell's place, or there is no GPU; nothing was started.
        InterruptedRun: a signal came; running cells have saved, and the next call goes on.
    """
    statuses = {cell.name: folder.status(cell) for cell in plan.cells}
    bad = (Status.failed, Status.diverged)
    again = [cell for cell in plan.cells if retry and statuses[cell.name] in bad]
    waiting = deque(
        cell for cell in plan.cells if statuses[cell.name] is Status.waiting or cell in again
    )
    if waiting and plan.cells[0].config.device == "cuda":
        require_cuda()
    for cell in again:
        folder.failure(cell).unlink(missing_ok=True)
        statuses[cell.name] = Status.waiting
    _wait_for_orphans(waiting, folder)
    running: list[_RunningCell] = []
    stop, at_once = Event(), Event()
    display = Display(plan, folder, waiting, stream)
    # That a run of a grid diverged is a result.
    troubling = (Status.failed,) if plan.has_grid else bad
    for cell in plan.cells:
        if statuses[cell.name] in troubling:
            display.message(f"{cell.name}: {statuses[cell.name]} before; --retry runs it again")
    with display, stop_signals(stop.set, lambda number: at_once.set()):
        try:
            while running or (waiting and not stop.is_set()):
                while waiting and not stop.is_set() and len(running) < jobs:
                    slot = min(set(range(jobs)) - {other.slot for other in running})
                    cell = waiting.popleft()
                    process = start_cell(cell, folder, gpus[slot % len(gpus)] if gpus else None)
                    running.append(_RunningCell(cell, process, slot))
                    display.started(cell)
                for one in list(running):
                    if stop.is_set() and not one.told_to_stop:
                        one.told_to_stop = True
                        one.process.terminate()
                    if at_once.is_set():
                        one.process.kill()
                    code = one.process.exitcode
                    if code is not None:
                        running.remove(one)
                        if stop.is_set() and code < 0:
                            code = InterruptedRun.exit_code  # stopped before it could save
                        statuses[one.cell.name] = folder.note_end(one.cell, code)
                        display.ended(one.cell, statuses[one.cell.name])
                if go_on is not None and not (running or waiting or stop.is_set()):
                    longer = go_on()
                    folder.claim(longer)
                    new = [cell for cell in longer.cells if cell.name not in statuses]
                    if new:
                        display.message(f"The search goes on: {_rates_by_line(new)}")
                    statuses |= {cell.name: folder.status(cell) for cell in new}
                    waiting.extend(c for c in new if statuses[c.name] is Status.waiting)
                    _wait_for_orphans(waiting, folder)
                    display.added(new, waiting)
                time.sleep(POLL_SECONDS)
        finally:
            # Only an unexpected failure leaves something here.
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


def _wait_for_orphans(cells: Iterable[Cell], folder: Folder) -> None:
    """Wait until no cell is run any more by a sweep that was killed."""
    for cell in cells:
        if (folder.run(cell) / LOCK).exists():
            with RunLock(folder.run(cell), patience_seconds=ORPHAN_SECONDS):
                pass


def _rates_by_line(cells: Sequence[Cell]) -> str:
    """Return the factors of the learning rate for each preset and batch size, in words."""
    factors: dict[str, list[str]] = {}
    for cell in cells:
        found = factors.setdefault(f"{cell.preset} at {cell.batch_size:,}", [])
        if (factor := f"×{cell.rate_factor:g}") not in found:
            found.append(factor)
    return ", ".join(f"{what} {' and '.join(found)}" for what, found in factors.items())


def devices_for(plan: Plan, jobs: str) -> tuple[int, list[str]]:
    """Return how many cells run at a time for `--jobs`, and the GPUs that they use in turn.

    Raises:
        UsageError: `jobs` is neither a number nor `auto`.
    """
    from egtrain.logs.environment import cores

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


def require_success(plan: Plan, folder: Folder, selected: Collection[str]) -> None:
    """Raise EgtrainError if cells have failed, or if some of those selected have diverged.

    That others diverged is a result of the grid.
    """
    failed = [
        cell
        for cell in plan.cells
        if (status := folder.status(cell)) is not Status.done
        and (cell.name in selected or status is not Status.diverged)
    ]
    if failed:
        names = ", ".join(cell.name for cell in failed[:3]) + (
            " and others" if len(failed) > 3 else ""
        )
        raise EgtrainError(
            f"{len(failed)} of {len(plan.cells)} cells failed ({names}): see "
            f"{folder.path / 'logs'}; --retry runs them again"
        )


@dataclass(frozen=True)
class Speed:
    """What a few steps of a preset took."""

    start_seconds: float
    """From the command to the first step, and from the last step to the end."""
    gradient_seconds: float
    """For one per-sample gradient."""
    evaluation_seconds: float


def measured_speeds(plan: Plan, gpus: list[str], stream: TextIO) -> dict[str, Speed] | None:
    """Return the speed of each preset's first cell; if one fails, print a line and return None."""
    speeds: dict[str, Speed] = {}
    firsts = {cell.preset: cell for cell in reversed(plan.cells)}
    with (
        tempfile.TemporaryDirectory(prefix="egtrain-") as scratch,
        Progress(stream) as progress,
        progress.bar("estimating the time", len(firsts) * MEASURED_STEPS) as bar,
    ):

        def look(preset: str) -> tuple[int, str]:
            steps, _ = last_metric(Path(scratch, firsts[preset].name), plan)
            return len(speeds) * MEASURED_STEPS + steps, preset

        wait_for_server()
        for preset in plan.presets:
            bar.watch(partial(look, preset))
            try:
                speeds[preset] = measured_speed(firsts[preset], gpus[:1], Path(scratch))
            except EgtrainError as error:
                progress.message(f"no estimate of the time: {error}")
                return None
    return speeds


def measured_speed(cell: Cell, gpus: Sequence[str], scratch: Path) -> Speed:
    """Return the speed of a cell, from a few steps after the first.

    Raises:
        EgtrainError: the run failed.
    """
    directory = scratch / cell.name
    arguments = cell.arguments(directory)
    for setting in (
        f"steps={MEASURED_STEPS}",
        "schedule.shorten_warmup=true",
        "log.every=1",
        "log.tensorboard=false",
    ):
        arguments += ["--set", setting]
    started = time.monotonic()
    log = scratch / f"{cell.name}.log"
    process = start_egtrain(arguments, gpus[0] if gpus else None, log)
    try:
        process.join()
    finally:
        process.kill()
        process.join()
    code = process.exitcode
    if code:
        raise EgtrainError(
            f"{cell.preset} failed within {MEASURED_STEPS} steps: {last_words(log, code)}"
        )
    whole = time.monotonic() - started
    lines = [
        json.loads(line)
        for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    clock = [line["wall"]["seconds"] for line in lines if line["split"] == "train"]
    held_out = [line["wall"]["seconds"] for line in lines if line["split"] != "train"]
    step = (clock[-1] - clock[0]) / (len(clock) - 1)
    evaluation = (held_out[-1] - clock[-1]) / len(held_out)
    start = whole - step * len(clock) - evaluation * len(held_out)
    return Speed(
        max(start, 0.0),
        step * summary["steps"] / summary["gradient_evaluations"],
        max(evaluation, 0.0),
    )


def estimated_seconds(cells: Sequence[Cell], speeds: dict[str, Speed], jobs: int) -> float:
    """Return how long cells will take, `jobs` at a time."""
    total = 0.0
    for cell in cells:
        speed = speeds[cell.preset]
        evaluations = cell.steps / cell.steps_per_epoch / cell.config.evaluate_every + 1
        total += speed.start_seconds + speed.gradient_seconds * cell.gradient_evaluations
        total += speed.evaluation_seconds * evaluations
    return total / min(jobs, max(1, len(cells)))
