"""A task combines data, loss and metric; the training loop only knows this protocol."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from egtrain.formatting import FRACTION, short_value_text, value_text

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Metric:
    """A number that a task measures."""

    name: str
    """In files, for example `token_accuracy`."""
    unit: str
    """In files; people see `FRACTION` in percent."""
    higher_is_better: bool
    of_mean_loss: Callable[[float], float] | None = None
    """Computes the metric from the mean loss, if it depends on that and is not itself a mean."""

    @property
    def label(self) -> str:
        """The name, for people."""
        return self.name.replace("_", " ")

    def facts(self) -> dict[str, str | bool]:
        """Return what a file says of it."""
        return {
            "name": self.name,
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
        }


LOSS = Metric("loss", "nats", higher_is_better=False)
ACCURACY = Metric("accuracy", FRACTION, higher_is_better=True)


class Task(Protocol):
    """The interface of tasks; a batch is a function of (seed, worker, step)."""

    metric: Metric
    """Of held-out data."""
    training_metric: Metric
    """Of mini-batches; not `metric` if that is too slow for every step."""
    best_possible: float | None
    """The best `metric` that any model can be expected to reach on the test split, if known."""
    sums: tuple[str, ...]
    """Names of the sums of `evaluate_batch`."""
    samples: int
    """N, the number of training samples."""
    batch_size: int
    """B = K·b, in samples."""
    worker_batch_size: int
    """b, in samples."""
    steps_per_epoch: int

    def batch(self, worker: int, step: int) -> Any:
        """Return the worker's mini-batch for a step."""

    def extra_batch(self, worker: int, step: int) -> Any:
        """Return an independent mini-batch for the step's second gradient."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the mean loss with its graph, and the mean training metric without one."""

    def frozen_batches(self, indices: Tensor) -> list[tuple[Any, int]]:
        """Return these training samples [samples], not augmented, in batches with their sizes."""

    def evaluation_size(self, split: Split) -> int:
        """Return the number of samples of a split."""

    def evaluation_batches(self, split: Split) -> int:
        """Return the number of evaluation batches of a split, whatever the ranks."""

    def evaluate_batch(self, model: nn.Module, split: Split, index: int) -> Tensor:
        """Return `sums` over one evaluation batch, float64, independent of other batches."""

    def metrics_of(self, sums: list[float], split: Split) -> dict[str, float]:
        """Return the mean `loss` in nats, and the metric, from the sums over a split."""


def metrics_text(
    values: Mapping[str, float | None],
    metrics: Sequence[Metric],
    best_possible: float | None = None,
    between: str = ", ",
) -> str:
    """Return metrics as text, such as `accuracy 71.20 %, loss 0.8912`.

    Args:
        values: by the name of the metric.
        metrics: those to show, if they have values, in this order.
        best_possible: of the first metric.
        between: the text between two metrics.
    """
    parts = []
    for metric in dict.fromkeys(metrics):
        if metric.name not in values:
            continue
        text = f"{metric.label} {value_text(values[metric.name], metric.unit)}"
        if metric is metrics[0] and best_possible is not None:
            text += f" of at best {short_value_text(best_possible, metric.unit)}"
        parts.append(text)
    return between.join(parts)
