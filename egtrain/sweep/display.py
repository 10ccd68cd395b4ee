"""What a sweep shows while it runs: bars on a terminal, and a line for each cell that ends."""

import json
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TextIO

from egtrain.formatting import value_text
from egtrain.progress import NAME_WIDTH, Bar, Progress
from egtrain.sweep.cells import Folder, Status
from egtrain.sweep.plan import Cell, Plan

TAIL_BYTES = 8192


class Display:
    """Shows the progress of a sweep; a context manager that restores the terminal at the end.

    `left` are the cells still to run.
    """

    def __init__(self, plan: Plan, folder: Folder, left: Sequence[Cell], stream: TextIO) -> None:
        self._plan, self._folder = plan, folder
        self._progress = Progress(stream, seconds_between_lines=0)
        self._cells = self._ended = self._total = 0
        self._gradients: dict[str, int] = {}
        """Gradient evaluations done of each cell."""
        self._take(plan.cells, left)
        self._running: dict[str, tuple[Bar, float]] = {}
        """By the cell's name: its bar, and when it was started."""

    def __enter__(self) -> Self:
        self._progress.__enter__()
        # Earlier work does not count towards the time left.
        done = sum(self._gradients.values())
        self._sweep = self._progress.bar("sweep", self._total, done, from_now=True)
        self._sweep.watch(lambda: (sum(self._gradients.values()), self._count()))
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.__exit__()

    def added(self, cells: Sequence[Cell], left: Sequence[Cell]) -> None:
        """Take further cells, of which `left` are still to run."""
        self._take(cells, left)
        self._sweep.extend(self._total)

    def started(self, cell: Cell) -> None:
        """Take a cell that has started."""
        name = cell.name if len(cell.name) <= NAME_WIDTH else f"…{cell.name[1 - NAME_WIDTH :]}"
        bar = self._progress.bar(name, cell.steps, self._standing(cell)[0])
        bar.watch(partial(self._standing, cell))
        self._running[cell.name] = bar, time.monotonic()

    def ended(self, cell: Cell, status: Status) -> None:
        """Take a cell whose process has ended."""
        bar, started = self._running.pop(cell.name)
        bar.remove()
        outcome = str(status)
        if status is Status.done:
            outcome = self._standing(cell)[1]
        elif status is Status.waiting:
            outcome = "interrupted"
        if status is not Status.waiting:
            self._ended += 1
            self._gradients[cell.name] = cell.gradient_evaluations
        line = f"{self._count()}  {cell.name}: {outcome}"
        took = f"{time.monotonic() - started:.0f} s"
        if self._progress.is_live:
            self.message(f"{line}  {took}")
        else:
            self._sweep.update(sum(self._gradients.values()), line, took)

    def message(self, text: str) -> None:
        """Print a line."""
        self._progress.message(text)

    def _take(self, cells: Sequence[Cell], left: Sequence[Cell]) -> None:
        self._cells += len(cells)
        self._ended += len(cells) - len(left)
        self._total += sum(cell.gradient_evaluations for cell in cells)
        self._gradients |= {cell.name: cell.gradient_evaluations for cell in cells}
        self._gradients |= {
            cell.name: cell.gradients_until(self._standing(cell)[0]) for cell in left
        }

    def _count(self) -> str:
        return f"{self._ended}/{self._cells}"

    def _standing(self, cell: Cell) -> tuple[int, str]:
        step, text = last_metric(self._folder.run(cell), self._plan)
        self._gradients[cell.name] = cell.gradients_until(step)
        return step, text


def last_metric(run: Path, plan: Plan) -> tuple[int, str]:
    """Return how many steps a run has made, and its last metric in words.

    With a grid, test results stay hidden until a point is selected.
    """
    for line in reversed(last_lines(run / "metrics.jsonl")):
        if not (plan.has_grid and line["split"] == "test"):
            value = line.get(plan.metric.name)
            text = f"{line['split']} {plan.metric.label} {value_text(value, plan.metric.unit)}"
            return line["step"], "" if value is None else text
    return 0, ""


def last_lines(file: Path) -> list[dict[str, Any]]:
    """Return the last whole lines of a metrics.jsonl that a run may be writing to."""
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - TAIL_BYTES))
            text = opened.read()
    except OSError:
        return []
    whole = text.split(b"\n")[1 if size > TAIL_BYTES else 0 : -1]
    return [json.loads(line) for line in whole]
