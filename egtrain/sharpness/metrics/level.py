"""Loss and metric of the task, on the frozen sample and on the test split."""

from collections.abc import Iterator

from egtrain.sharpness.metric import Measured, ModelAtCheckpoint, SharpnessMetric, Values
from egtrain.sharpness.records import Row


def measure(model: ModelAtCheckpoint) -> Measured:
    """Return loss and metric by split."""
    loss, score = model.loss.value()
    metric = model.task.training_metric
    if metric.of_mean_loss is not None:
        score = metric.of_mean_loss(loss)  # not the mean over batches
    train = {"loss": loss, metric.name: score}
    return {"train": train, **({"test": model.test} if model.test else {})}, {}


def rows(values: Values) -> Iterator[Row]:
    """Yield loss and metric of each split; the test split is in TensorBoard already."""
    for split, found in values.items():
        for name, value in found.items():
            quantity = f"{split}_{name}"
            yield Row(quantity, value, tag=quantity if split == "train" else "")


METRIC = SharpnessMetric(
    default={}, thorough={}, cost=lambda p, settings: 1.0, measure=measure, rows=rows
)
