"""A task binds data, loss and metric; the training loop knows no more of it than this protocol."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from egtrain.formatting import FRACTION, short_value_text, value_text

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Metric:
    """What a task measures; values stand in files in `unit`."""

    name: str
    """In files, for example `token_accuracy`."""
    unit: str
    """`FRACTION` is shown in percent."""
    higher_is_better: bool
    of_mean_loss: Callable[[float], float] | None = None
    """Returns it from the mean loss, where it is a function of that and no mean itself."""

    @property
    def label(self) -> str:
        """The name, for people."""
        return self.name.replace("_", " ")


LOSS = Metric("loss", "nats", higher_is_better=False)
ACCURACY = Metric("accuracy", FRACTION, higher_is_better=True)


class Task(Protocol):
    """What training and evaluation ask of a task; a batch is a function of (seed, worker, step)."""

    metric: Metric
    """Of held-out data."""
    training_metric: Metric
    """Of mini-batches; another one where `metric` is too dear to take in every step."""
    best_possible: float | None
    """The best value of `metric` to be expected of any model on the test split, where it is
    known."""
    sums: tuple[str, ...]
    """Names of what `evaluate_batch` adds up."""
    samples: int
    """N, the number of training samples."""
    batch_size: int
    """B = K·b, in samples."""
    worker_batch_size: int
    """b, in samples."""
    steps_per_epoch: int

    def batch(self, worker: int, step: int) -> Any:
        """Return the worker's mini-batch of a step."""

    def extra_batch(self, worker: int, step: int) -> Any:
        """Return an independent mini-batch for a second gradient in the step."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the mean loss, with its graph, and the mean of the training metric, without."""

    def frozen_batches(self, indices: Tensor) -> list[tuple[Any, int]]:
        """Return these training samples [samples], not augmented, in batches with sizes."""

    def evaluation_size(self, split: Split) -> int:
        """Return the number of samples of a split."""

    def evaluation_batches(self, split: Split) -> int:
        """Return the number of batches that a split is evaluated in, on any ranks."""

    def evaluate_batch(self, model: nn.Module, split: Split, index: int) -> Tensor:
        """Return `sums` over one evaluation batch, in float64, whatever the other batches."""

    def metrics_of(self, sums: list[float], split: Split) -> dict[str, float]:
        """Return the mean `loss` in nats, and the metric, from the sums over a split."""


def metrics_text(
    values: Mapping[str, float | None],
    metrics: Sequence[Metric],
    best_possible: float | None = None,
    between: str = ", ",
) -> str:
    """Return those of the values that are metrics, in words: `accuracy 71.20 %, loss 0.8912`.

    Args:
        values: by the name of the metric.
        metrics: in the order in which they are told.
        best_possible: of the first of them.
        between: what stands between two metrics.
    """
    parts = []
    for metric in metrics:
        if metric.name not in values:
            continue
        text = f"{metric.label} {value_text(values[metric.name], metric.unit)}"
        if metric is metrics[0] and best_possible is not None:
            text += f" of at best {short_value_text(best_possible, metric.unit)}"
        parts.append(text)
    return between.join(parts)
