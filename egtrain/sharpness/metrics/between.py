"""The loss on the straight line from the first run to each other run."""

import math
from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from egtrain.sharpness import landscape, metric
from egtrain.sharpness.drawing import style_of
from egtrain.sharpness.metric import Measured, ModelAtCheckpoint, Panel, Values
from egtrain.sharpness.records import Row
from egtrain.sharpness.runs import Run

WIDE = 10.0
"""If the losses differ by a larger factor, the axis is logarithmic."""


def measure(model: ModelAtCheckpoint, points: int) -> Measured:
    """Return the barrier, and loss and metric along the line."""
    loss, batches, forward = model.loss, model.batches, model.task.loss
    path = landscape.between(
        loss,
        model.first_weights,
        landscape.copied(loss.parameters),
        points=points,
        recompute_statistics=lambda: landscape.recompute_batchnorm(loss.model, batches, forward),
    )
    curves = {name: tensor.tolist() for name, tensor in vars(path).items()}
    return {"barrier": barrier(curves["positions"], curves["losses"])}, curves


def barrier(positions: Sequence[float], losses: Sequence[float]) -> float:
    """Return how far the loss rises above the straight line from position 0 to position 1."""
    at = dict(zip(positions, losses, strict=True))
    start, end = (at[min(at, key=lambda p: abs(p - goal))] for goal in (0.0, 1.0))
    inside = [loss - ((1 - p) * start + p * end) for p, loss in at.items() if 0 <= p <= 1]
    return max(inside, default=math.nan)


def rows(values: Values) -> Iterator[Row]:
    """Yield the barrier."""
    yield Row("barrier", values["barrier"], title="barrier from run 1")


def draw(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw the loss over the position on the line."""
    losses = []
    for number, run in enumerate(runs[1:], 1):
        curves = run.records["between"].curves
        axes.plot(curves["positions"], curves["losses"], **style_of(number))
        losses += curves["losses"]
    for end in (0, 1):
        axes.axvline(end, color="#444444", linewidth=0.8, linestyle=":")
    if max(losses) > WIDE * min(losses) > 0:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title("Loss on the way from run 1 to the others")
    axes.set_xlabel("position: run 1 at 0, the other run at 1")
    axes.set_ylabel("loss")


METRIC = metric.SharpnessMetric(
    default={"points": 21},
    thorough={"points": 81},
    cost=lambda p, settings: 2 * p["points"],  # with the statistics
    measure=measure,
    rows=rows,
    panels=(Panel(draw, picture="sharpness-paths", of_one_run=False),),
    from_first_run=True,
)
