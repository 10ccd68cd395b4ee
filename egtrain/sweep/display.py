"""What a sweep shows while it runs: a table of the running cells on a terminal, a line a cell
everywhere else.
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from egtrain.formatting import duration, value_text
from egtrain.progress import can_redraw
from egtrain.sweep.plan import Cell, Plan

if TYPE_CHECKING:
    from egtrain.tasks import Metric

TAIL_BYTES = 8192
SECONDS_BETWEEN_LOOKS = 0.5


@dataclass
class _Watched:
    cell: Cell
    directory: Path
    started: float = field(default_factory=time.monotonic)
    first: tuple[int, float] | None = None
    """Step and time at the first look that found one."""
    step: int = 0
    shown: str = "starting"

    def look(self, metric: "Metric", unseen: str | None) -> None:
        """Read how far the cell is, and its last metric that is not of the unseen split."""
        for line in reversed(last_lines(self.directory / "metrics.jsonl")):
            if line["split"] == unseen:
                continue
            self.step = line["step"]
            value = line.get(metric.name)
            self.shown = (
                f"{line['split']} {metric.label} {value_text(value, metric.unit)}"
                if value is not None
                else ""
            )
            break
        if self.first is None and self.step:
            self.first = self.step, time.monotonic()

    def seconds_left(self) -> float | None:
        """Return the time that its remaining steps will take."""
        if self.first is None or self.step <= self.first[0]:
            return None
        return (
            (time.monotonic() - self.first[1])
            / (self.step - self.first[0])
            * (self.cell.steps - self.step)
        )


class Display:
    """Shows how far a sweep is; a context manager, which gives the terminal back however the sweep
    ends.
    """

    def __init__(self, plan: Plan, stream: TextIO) -> None:
        self._plan = plan
        # Before a point of the grid is selected, nobody is to look at test results.
        self._unseen = "test" if plan.has_grid else None
        self._console = Console(file=stream, highlight=False)
        self._running: list[_Watched] = []
        self._ended = 0
        self._done_before = self._done = 0.0
        """Gradient evaluations: what was there before (of a cell that goes on, a part), and of all
        ended cells."""
        self._started = self._looked = time.monotonic()
        self._live: Live | None = None
        if can_redraw(self._console):
            self._live = Live(
                console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop"
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def skipped(self, cell: Cell, status: str) -> None:
        """Take a cell that was finished before."""
        self._ended += 1
        self._done_before += cell.gradient_evaluations
        self._done += cell.gradient_evaluations
        if status != "done":
            self.message(f"{cell.name}: {status} before; --retry runs it again")

    def started(self, cell: Cell, directory: Path) -> None:
        """Take a cell that begins to run."""
        if before := last_lines(directory / "metrics.jsonl"):
            self._done_before += cell.gradient_evaluations * before[-1]["step"] / cell.steps
        self._running.append(_Watched(cell, directory))
        self.refresh(now=True)

    def ended(self, cell: Cell, status: str) -> None:
        """Take a cell whose process is over."""
        (watched,) = [one for one in self._running if one.cell is cell]
        self._running.remove(watched)
        watched.look(self._plan.metric, self._unseen)
        number = ""
        if status != "waiting":
            self._ended += 1
            self._done += cell.gradient_evaluations
            number = f"{self._ended}/{len(self._plan.cells)}  "
        outcome = (
            watched.shown if status == "done" else "interrupted" if status == "waiting" else status
        )
        self.refresh(now=True)
        left = self.seconds_left()
        parts = [f"{number}{cell.name}: {outcome}", f"{time.monotonic() - watched.started:.0f} s"]
        parts += [f"{duration(left)} left"] if left else []
        self.message("  ".join(parts))

    def refresh(self, now: bool = False) -> None:
        """Look at the running cells and show them; on a terminal only, and twice a second at
        most.
        """
        if self._live is None or not (
            now or time.monotonic() - self._looked > SECONDS_BETWEEN_LOOKS
        ):
            return
        self._looked = time.monotonic()
        for watched in self._running:
            watched.look(self._plan.metric, self._unseen)
        self._live.update(self._render(), refresh=True)

    def message(self, text: str) -> None:
        """Print a line of its own."""
        self._console.print(Text(text), soft_wrap=True)

    def seconds_left(self) -> float | None:
        """Return the time that the rest of the sweep will take at the pace so far; None before
        there is one.
        """
        part = sum(
            one.cell.gradient_evaluations * one.step / one.cell.steps for one in self._running
        )
        whole = sum(cell.gradient_evaluations for cell in self._plan.cells)
        pace = (self._done + part - self._done_before) / max(time.monotonic() - self._started, 1e-9)
        return (whole - self._done - part) / pace if pace > 0 else None

    def _render(self) -> RenderableType:
        table = Table.grid(expand=True, padding=(0, 1))
        table.add_column(no_wrap=True, overflow="ellipsis", max_width=40)
        table.add_column(ratio=1, min_width=8)
        for _ in range(2):
            table.add_column(no_wrap=True, justify="right")
        for one in self._running:
            left = one.seconds_left()
            bar = ProgressBar(total=max(one.cell.steps, 1), completed=one.step)
            table.add_row(
                one.cell.name, bar, one.shown, "" if left is None else f"{duration(left)} left"
            )
        left = self.seconds_left()
        bar = ProgressBar(total=len(self._plan.cells), completed=self._ended)
        count = f"{self._ended} of {len(self._plan.cells)} cells"
        table.add_row(
            Text("sweep", style="bold"),
            bar,
            count,
            "" if left is None else f"{duration(left)} left",
        )
        return Group(table)


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
