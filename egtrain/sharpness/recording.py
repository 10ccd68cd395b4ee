"""One measurement of one model, with the work that it took."""

import time

from egtrain.sharpness.metric import MeasuredModel, Parameters
from egtrain.sharpness.metrics import metric_of
from egtrain.sharpness.records import Record


def measured(model: MeasuredModel, metric: str, parameters: Parameters) -> Record:
    """Measure a metric, and count its products, gradients, evaluations and seconds."""
    loss, started = model.loss, time.monotonic()
    loss.products = loss.gradients = loss.evaluations = 0
    values, curves = metric_of(metric).measure(model, **parameters)
    seconds = round(time.monotonic() - started, 3)
    return Record(values, curves, loss.products, loss.gradients, loss.evaluations, seconds)
