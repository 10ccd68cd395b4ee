"""The progress display: a live bar on a terminal, now and then a plain line everywhere else."""

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from egtrain.formatting import duration as duration

REFRESHES_PER_SECOND = 4
FRACTIONS = {"accuracy", "token_accuracy"}
"""Metrics that are shown in percent."""


class Display:
    """Shows how far a run is; a context manager, which gives the terminal back however the run
    ends.

    A stream that can no longer be written (a closed pipe) ends the display, never the run.

    Args:
        name: of the run.
        epochs: of the whole run.
        steps: of the whole run.
        start_step: where a resumed run goes on.
        shown: the training metrics to show.
        stream: the terminal, file or pipe; standard output if None.
        seconds_between_lines: at least so many between two plain lines on training.
    """

    def __init__(
        self,
        name: str,
        *,
        epochs: float,
        steps: int,
        start_step: int = 0,
        shown: Sequence[str] = ("loss", "accuracy"),
        stream: TextIO | None = None,
        seconds_between_lines: float = 10.0,
    ) -> None:
        self._name = name
        self._epochs = math.ceil(epochs - 1e-9)
        self._steps = steps
        self._step = self._start_step = start_step
        self._shown = tuple(shown)
        self._stream = sys.stdout if stream is None else stream
        self._seconds_between_lines = seconds_between_lines
        self._status = "starting"
        self._speed: float | None = None
        self._started = self._last_line = time.monotonic()
        self._first: tuple[int, float] | None = None
        """Step and time of the first update, from which the time left is reckoned; what came before
        was start-up."""
        self._seconds_left: float | None = None
        console = Console(file=self._stream, highlight=False)
        self._live: Live | None = None
        if can_redraw(console):
            self._live = Live(
                console=console,
                get_renderable=self._render,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
                vertical_overflow="crop",
            )

    def __enter__(self) -> Self:
        self._started = self._last_line = time.monotonic()
        start = (
            f"from step {self._start_step:,}"
            if self._start_step
            else f"{_counted(self._epochs, 'epoch')}"
        )
        self.message(
            f"{self._name}: {start}, "
            f"{_counted(self._steps, 'step')}{' in all' if self._start_step else ''}"
        )
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
        done = "done" if kind is None and self._step >= self._steps else "stopped"
        self.message(
            f"{self._name}: {done} at step {self._step:,} of {self._steps:,} "
            f"after {duration(time.monotonic() - self._started)}"
        )

    def step(
        self,
        step: int,
        epoch: float,
        metrics: Mapping[str, float],
        samples_per_second: float | None = None,
    ) -> None:
        """Take a completed update; `epoch` may be the running number or the fraction of epochs
        done.
        """
        now = time.monotonic()
        self._step, self._speed = step, samples_per_second
        if self._first is None:
            self._first = step, now
        elif step > self._first[0]:
            self._seconds_left = (
                (now - self._first[1]) / (step - self._first[0]) * max(self._steps - step, 0)
            )
        values = {name: metrics[name] for name in self._shown if name in metrics}
        self._status = f"{self._position(step, epoch)}  {_described(values)}"
        if self._live is None and now - self._last_line >= self._seconds_between_lines:
            self._last_line = now
            self.message(
                "  ".join(
                    part for part in (self._status, self._speed_text(), self._left_text()) if part
                )
            )

    def evaluation(self, step: int, epoch: float, split: str, metrics: Mapping[str, float]) -> None:
        """Take the metrics of an evaluation; it stays on the screen."""
        self.message(f"{self._position(step, epoch)}  {split}: {_described(metrics)}")

    def message(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        try:
            if self._live is not None:
                self._live.console.print(Text(text), soft_wrap=True)
            else:
                print(text, file=self._stream, flush=True)
        except BrokenPipeError:
            # The reader is gone. From here on all goes nowhere, also what Python still writes there
            # when it exits.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            # The terminal is gone, or the stream was closed: nobody looks, and the training matters
            # more.
            return

    def _position(self, step: int, epoch: float) -> str:
        epochs, steps = str(self._epochs), f"{self._steps:,}"
        current = min(math.ceil(epoch - 1e-9), self._epochs)
        return f"epoch {current:>{len(epochs)}}/{epochs}  step {step:>{len(steps)},}/{steps}"

    def _speed_text(self) -> str:
        return "" if self._speed is None else f"{self._speed:,.0f} samples/s"

    def _left_text(self) -> str:
        return "" if self._seconds_left is None else f"{duration(self._seconds_left)} left"

    def _render(self) -> RenderableType:
        fraction = self._step / self._steps if self._steps else 1.0
        first_line = Table.grid(expand=True, padding=(0, 1))
        first_line.add_column(no_wrap=True, overflow="ellipsis", max_width=26)
        first_line.add_column(ratio=1, min_width=8)
        for _ in range(3):
            first_line.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=max(self._steps, 1), completed=self._step)
        first_line.add_row(
            Text(self._name), bar, f"{fraction:.0%}", self._speed_text(), self._left_text()
        )
        return Group(first_line, Text(self._status, no_wrap=True, overflow="ellipsis"))


def can_redraw(console: Console) -> bool:
    """Return whether a console is a terminal on which lines can change, and no pipe or file that is
    told to be one.
    """
    return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _described(metrics: Mapping[str, float]) -> str:
    """Return metrics in words; fractions in percent, the others with four significant digits."""
    parts = [
        f"{name.replace('_', ' ')} {f'{value:.2%}' if name in FRACTIONS else f'{value:#.4g}'}"
        for name, value in metrics.items()
    ]
    return "  ".join(parts)


def headline(metrics: Mapping[str, float | None]) -> str:
    """Return final metrics in words, the loss last."""
    parts = []
    for name, value in sorted(metrics.items(), key=lambda item: item[0] == "loss"):
        number = math.nan if value is None else value
        parts.append(
            f"{name} {number:.2%}"
            if name in FRACTIONS
            else f"{name} {number:.{4 if name == 'loss' else 2}f}"
        )
    return ", ".join(parts)
