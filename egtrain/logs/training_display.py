"""What `train` shows while it trains: a bar, the latest metrics and each evaluation."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Self, TextIO

from egtrain.formatting import count, counted, duration
from egtrain.progress import Progress
from egtrain.tasks import LOSS, Metric, metrics_text


class TrainingDisplay:
    """Shows the progress of a run; a context manager that restores the terminal at the end.

    `epochs` and `steps` are those of the whole run, which goes on after `start_step`. `metrics` are
    those to show of mini-batches and evaluations. For the rest see `Progress`.
    """

    def __init__(
        self,
        name: str,
        *,
        epochs: float,
        steps: int,
        start_step: int = 0,
        metrics: Sequence[Metric] = (LOSS,),
        stream: TextIO | None = None,
        seconds_between_lines: float = 10.0,
    ) -> None:
        self._name = name
        self._epochs = math.ceil(epochs - 1e-9)
        self._whole_epochs = abs(epochs - round(epochs)) < 1e-9
        self._steps = steps
        self._step = self._start_step = start_step
        self._metrics = tuple(dict.fromkeys(metrics))
        self._progress = Progress(stream, seconds_between_lines=seconds_between_lines)
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        text = counted(self._steps, "step")
        if self._start_step:
            text = f"from step {count(self._start_step)}, {text} in all"
        elif self._whole_epochs:
            text = f"{counted(self._epochs, 'epoch')}, {text}"
        self.message(f"{self._name}: {text}")
        self._progress.__enter__()
        self._bar = self._progress.bar(self._name, self._steps, self._start_step)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.__exit__()
        done = "done" if kind is None and self._step >= self._steps else "stopped"
        self.message(
            f"{self._name}: {done} at step {count(self._step)} of {count(self._steps)} "
            f"after {duration(time.monotonic() - self._started)}"
        )

    def step(
        self,
        step: int,
        epoch: float,
        metrics: Mapping[str, float],
        samples_per_second: float | None = None,
    ) -> None:
        """Take a completed update; `epoch` may be a fraction."""
        self._step = step
        speed = "" if samples_per_second is None else f"{count(samples_per_second)} samples/s"
        text = metrics_text(metrics, self._metrics, between="  ")
        self._bar.update(step, f"{self._position(step, epoch)}  {text}", speed)

    def evaluating(self, split: str, done: int, total: int) -> None:
        """Take the number of evaluated batches of a split."""
        self._progress.report(f"evaluating on {split}", done, total)

    def evaluation(self, step: int, epoch: float, split: str, metrics: Mapping[str, float]) -> None:
        """Take the metrics of an evaluation; it stays on the screen."""
        text = metrics_text(metrics, self._metrics, between="  ")
        self.message(f"{self._position(step, epoch)}  {split}: {text}")

    def message(self, text: str) -> None:
        """Print a line, above any bar."""
        self._progress.message(text)

    def _position(self, step: int, epoch: float) -> str:
        epochs, steps = str(self._epochs), count(self._steps)
        current = min(math.ceil(epoch - 1e-9), self._epochs)
        return f"epoch {current:>{len(epochs)}}/{epochs}  step {step:>{len(steps)},}/{steps}"
