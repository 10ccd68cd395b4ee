"""What a run leaves to read: metrics.jsonl, TensorBoard events and summary, each step once."""

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from egtrain.disk import write_atomically
from egtrain.errors import EgtrainError
from egtrain.logs.events import Events
from egtrain.logs.growing_file import GrowingFile
from egtrain.logs.training_display import TrainingDisplay

TAGS = {
    "learning_rate": "schedule/learning_rate",
    "gradient_norm": "gradient/norm",
    "local_gradient_norm": "gradient/local_norm",
    "noise_scale": "gradient/noise_scale",
    "gradient_alignment": "gradient/alignment",
    "synchronisations": "post_local/synchronisations",
    "samples_per_second": "speed/samples_per_second",
}
"""TensorBoard's name of a training metric; one that is not here is `train/<name>`.

TensorBoard's table of hyperparameters starts with the first five names, so all sort after
`final/`.
"""
OVER_SAMPLES = "over_samples"
"""Folder of the curves over samples, and the group of their names. TensorBoard has one step per run
and forgets later ones when a run is resumed, so these curves are a run by themselves."""

SMOOTHED_STEPS = 20


class RunLog:
    """Writes a run's metrics to metrics.jsonl and TensorBoard events, and shows them.

    If a file cannot be written during the run, there is one warning, and its records wait in memory
    for room on the disk.

    Args:
        directory: of the run; it must exist.
        batch_size: the samples of a step.
        tensorboard: whether to write events.
        resume_step: the run goes on after this step, and what was logged later is cut off; 0 or
            None: it starts, and everything is cut off.
        every: steps between two lines of training metrics.
        display: shows every step.
        warn: takes a one-line warning; by default shown by the display or on standard error.

    Raises:
        EgtrainError: the files cannot be opened.
    """

    def __init__(
        self,
        directory: Path,
        *,
        batch_size: int,
        tensorboard: bool = True,
        resume_step: int | None = None,
        every: int = 1,
        display: TrainingDisplay | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._display = display
        self._warn = warn or self._show_warning
        self._every = every
        self._step = resume_step or 0
        self._batch_size = batch_size
        self._speed = _Speed()
        metrics = directory / "metrics.jsonl"
        try:
            seconds = _cut_lines_after(metrics, self._step)
            self._lines = GrowingFile(metrics, self._warn)
            self._events = Events(directory, self._step, self._warn) if tensorboard else None
            self._over_samples = (
                Events(directory / OVER_SAMPLES, self._step * batch_size, self._warn)
                if tensorboard
                else None
            )
        except OSError as error:
            raise EgtrainError(
                f"cannot write {error.filename or directory}: {error.strerror}: "
                "free some space or make the folder writable, and start again"
            ) from error
        self._zero_time = time.monotonic() - seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def train_step(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a completed update."""
        self._step = step
        speed = self._speed.after_step(self._batch_size)
        if self._display is not None:
            self._display.step(step, epoch, metrics, speed)
        if step % self._every:
            return
        self._write_line(step, epoch, "train", metrics, {"samples_per_second": speed})
        if self._events is not None:
            values = dict(metrics) if speed is None else {**metrics, "samples_per_second": speed}
            self._events.scalars(
                {TAGS.get(name, f"train/{name}"): value for name, value in values.items()}, step
            )
            self._write_over_samples("train", {k: v for k, v in metrics.items() if k == "loss"})

    def evaluation(self, step: int, epoch: float, split: str, metrics: Mapping[str, float]) -> None:
        """Take the metrics of an evaluation after `step` updates."""
        self._step = step
        if self._display is not None:
            self._display.evaluation(step, epoch, split, metrics)
        self._write_line(step, epoch, split, metrics, {})
        if self._events is not None:
            self._events.scalars(
                {f"{split}/{name}": value for name, value in metrics.items()}, step
            )
            self._write_over_samples(split, metrics)
        self._speed.restart_clock()

    def text(self, tag: str, text: str) -> None:
        """Write a Markdown text to TensorBoard, unless an earlier part of the run did."""
        if self._events is not None:
            self._events.text(tag, text, self._step)

    def hyperparameters(
        self, values: Mapping[str, object], final_metrics: Mapping[str, float]
    ) -> None:
        """Add the run to TensorBoard's table of hyperparameters; call it at the end.

        Args:
            values: flat; those that are None are left out.
            final_metrics: shown in the table as `final/<name>`.
        """
        if self._events is not None:
            self._events.hyperparameters(values, final_metrics, self._step)

    def restart_clock(self) -> None:
        """Leave the time since the last step out of the speed: a checkpoint took it."""
        self._speed.restart_clock()

    def flush(self) -> None:
        """Write and sync everything before a checkpoint, which must not be ahead of the log."""
        self._lines.sync()
        for events in self._event_files():
            events.file.sync()
        self._speed.restart_clock()

    def close(self) -> None:
        """Write and sync everything, and close the files."""
        self._lines.close()
        for events in self._event_files():
            events.file.close()

    def _event_files(self) -> list[Events]:
        return [events for events in (self._events, self._over_samples) if events is not None]

    def _write_over_samples(self, split: str, metrics: Mapping[str, float]) -> None:
        if self._over_samples is not None and metrics:
            tags = {f"{OVER_SAMPLES}/{split}_{name}": value for name, value in metrics.items()}
            self._over_samples.scalars(tags, self._step * self._batch_size)

    def _write_line(
        self,
        step: int,
        epoch: float,
        split: str,
        metrics: Mapping[str, float],
        wall: Mapping[str, float | None],
    ) -> None:
        wall = {"seconds": round(time.monotonic() - self._zero_time, 3), **wall}
        line = {"step": step, "epoch": epoch, "split": split, **metrics, "wall": wall}
        self._lines.write(json.dumps(finite(line), allow_nan=False).encode() + b"\n")

    def _show_warning(self, message: str) -> None:
        if self._display is not None:
            self._display.message(f"warning: {message}")
        else:
            print(f"warning: {message}", file=sys.stderr)


class _Speed:
    """Samples per second over the last steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=SMOOTHED_STEPS)
        self._since: float | None = None

    def after_step(self, samples: int) -> float | None:
        """Return the speed after a step; None after the first, which includes the start-up."""
        now = time.monotonic()
        if self._since is not None:
            self._steps.append((samples, now - self._since))
        self._since = now
        seconds = sum(seconds for _, seconds in self._steps)
        return (
            round(sum(samples for samples, _ in self._steps) / seconds, 1) if seconds > 0 else None
        )

    def restart_clock(self) -> None:
        if self._since is not None:
            self._since = time.monotonic()


def _cut_lines_after(path: Path, step: int) -> float:
    """Cut off torn lines and those of later steps; return the seconds of the last one left."""
    if not path.exists():
        return 0.0
    if not step:
        os.truncate(path, 0)
        return 0.0
    size = path.stat().st_size
    kept: list[bytes] = []
    seconds = 0.0
    with path.open("rb") as file:
        for line in file:
            try:
                values = json.loads(line)
                late, now = values["step"] > step, float(values["wall"]["seconds"])
            except (ValueError, KeyError, TypeError):
                continue
            if not late:
                kept.append(line.rstrip(b"\n") + b"\n")
                seconds = now
    if sum(map(len, kept)) != size:
        write_atomically(path, b"".join(kept))
    return seconds


def finite(value: Any) -> Any:
    """Return a nested value with None for infinities and NaN, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json or plan.json, atomically.

    Raises:
        EgtrainError: it could not be written.
    """
    write_atomically(path, (json.dumps(finite(summary), indent=2, allow_nan=False) + "\n").encode())
