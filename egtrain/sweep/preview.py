"""What a sweep says before it starts: its plan as a table, with the time that it takes by a few
measured steps.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from egtrain.errors import EgtrainError
from egtrain.progress import duration
from egtrain.sweep.cell import started_egtrain, warm_up
from egtrain.sweep.execution import Folder, Status, last_words
from egtrain.sweep.plan import Cell, Plan

MEASURED_STEPS = 4


@dataclass(frozen=True)
class Speed:
    """What a few steps of a preset took."""

    start_seconds: float
    """From the command to the first step, and from the last one to the end."""
    gradient_seconds: float
    """A per-sample gradient."""
    evaluation_seconds: float


def print_plan(plan: Plan, console: Console, jobs: int, speeds: dict[str, Speed] | None) -> None:
    """Print what a sweep runs, by preset and batch size, and the rule that scales rates."""
    table = Table(box=None, pad_edge=False)
    titles = (
        "preset",
        "batch",
        "K",
        "b",
        "rate",
        "shift",
        "epochs",
        "steps",
        "gradients a run",
        "runs",
        "time",
    )
    for number, title in enumerate(titles if speeds else titles[:-1]):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    for preset in plan.presets:
        for batch_size in plan.batch_sizes:
            cells = [
                cell
                for cell in plan.cells
                if (cell.preset, cell.batch_size) == (preset, batch_size)
            ]
            first = cells[0]
            rates = dict.fromkeys(f"{cell.learning_rate:.4g}" for cell in cells)
            shifts = dict.fromkeys(
                "–" if cell.length is None else f"{cell.length[1]:.3g}" for cell in cells
            )
            row = [
                preset,
                f"{batch_size:,}",
                str(first.config.workers),
                str(first.config.worker_batch_size),
            ]
            row += [
                " ".join(rates),
                f"{first.length[0] if first.length else ''} {' '.join(shifts)}".strip(),
            ]
            row += [f"{first.steps / first.steps_per_epoch:.4g}", f"{first.steps:,}"]
            row += [f"{first.gradient_evaluations:,}", str(len(cells))]
            row += [duration(estimated_seconds(cells, speeds, 1))] if speeds else []
            table.add_row(*map(Text, row))
    console.print(table)
    console.print(plan.rule, soft_wrap=True)
    for note in plan.notes:
        console.print(note, soft_wrap=True)
    total = sum(cell.gradient_evaluations for cell in plan.cells)
    seconds = f", about {duration(estimated_seconds(plan.cells, speeds, jobs))}" if speeds else ""
    console.print(
        f"{len(plan.cells)} runs, {jobs} at a time, {total:,} gradient evaluations{seconds}",
        soft_wrap=True,
    )


def print_standing(plan: Plan, folder: Folder, console: Console) -> None:
    """Print what of a sweep has been done before, if anything has."""
    left = [cell for cell in plan.cells if folder.status(cell) is not Status.done]
    done = len(plan.cells) - len(left)
    if done:
        gradients = sum(cell.gradient_evaluations for cell in left)
        console.print(
            f"{done} of them are finished; {gradients:,} gradient evaluations are left",
            soft_wrap=True,
        )


def measured_speeds(plan: Plan, gpus: list[str], console: Console) -> dict[str, Speed] | None:
    """Return how quickly each preset trains, from its first cell; None, said in a line, where one
    of them fails.
    """
    speeds = {}
    warm_up()
    with tempfile.TemporaryDirectory(prefix="egtrain-") as scratch:
        for preset in plan.presets:
            cell = next(cell for cell in plan.cells if cell.preset == preset)
            try:
                speeds[preset] = measured_speed(cell, gpus[0] if gpus else None, Path(scratch))
            except EgtrainError as error:
                console.print(f"no estimate of the time: {error}", soft_wrap=True, markup=False)
                return None
    return speeds


def measured_speed(cell: Cell, gpu: str | None, scratch: Path) -> Speed:
    """Return how quickly a cell trains, from a throw-away run of a few steps, the first of which is
    left out.

    Raises:
        EgtrainError: the run failed.
    """
    directory = scratch / cell.name
    extra = [f"steps={MEASURED_STEPS}", "log.every=1", "log.tensorboard=false"]
    arguments = [
        *cell.arguments(directory),
        *[part for setting in extra for part in ("--set", setting)],
    ]
    started = time.monotonic()
    log = scratch / f"{cell.name}.log"
    process = started_egtrain(arguments, gpu, log)
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
