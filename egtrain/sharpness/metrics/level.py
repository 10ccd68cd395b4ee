"""Loss and metric of the task, on the frozen sample and on the test split."""

import math
from collections.abc import Iterator

from egtrain.sharpness.metric import (
    PASS_COST,
    Measured,
    ModelAtCheckpoint,
    Number,
    Parameters,
    SharpnessMetric,
)
from egtrain.sharpness.records import Record


def measure(model: ModelAtCheckpoint, parameters: Parameters) -> Measured:
    """Return loss and metric by split."""
    value, score = model.loss.value()
    name = model.task.training_metric.name
    if name == "perplexity":
        score = math.exp(value)  # which the mean over batches is not
    train = {"loss": value, name: score}
    return {"train": train, **({"test": model.test} if model.test else {})}, {}


def numbers(record: Record) -> Iterator[Number]:
    """Yield loss and metric of each split; the test split is in TensorBoard already."""
    for split, found in record.values.items():
        for name, value in found.items():
            quantity = f"{split}_{name}"
            yield Number(quantity, value, tag=quantity if split == "train" else None)


METRIC = SharpnessMetric(
    default={},
    thorough={},
    cost=lambda settings: PASS_COST,
    measure=measure,
    numbers=numbers,
)
