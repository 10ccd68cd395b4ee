"""A task binds data, loss and metric; the training loop knows no more of it than this protocol."""

from typing import Any, Literal, Protocol

from torch import Tensor, nn

Split = Literal["validation", "test"]


class Task(Protocol):
    """What the training loop and the evaluation ask of a task; every batch is a function of (seed,
    worker, step).
    """

    metric: str
    """Name of the metric of held-out data, for example `accuracy`."""
    training_metric: str
    """Name of the metric of mini-batches; another one where `metric` is too dear to take in every
    step."""
    higher_is_better: bool
    """Of `metric`."""
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
        """Return these training samples [samples], without augmentation, in batches with their
        sizes.
        """

    def evaluation_size(self, split: Split) -> int:
        """Return the number of samples of a split."""

    def evaluation_batches(self, split: Split) -> int:
        """Return the number of batches that a split is evaluated in, whatever the number of
        ranks.
        """

    def evaluate_batch(self, model: nn.Module, split: Split, index: int) -> Tensor:
        """Return `sums` over one evaluation batch, in float64; it does not depend on the other
        batches.
        """

    def metrics_of(self, sums: list[float], split: Split) -> dict[str, float]:
        """Return the mean loss in nats, as `loss`, and the metric from the sums over a whole
        split.
        """
