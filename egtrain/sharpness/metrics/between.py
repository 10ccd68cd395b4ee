"""The loss on the straight line from the first run to each other one."""

import math
from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from egtrain.formatting import number as number_text
from egtrain.sharpness.drawing import colour, line_style
from egtrain.sharpness.landscape import between, copied, recompute_batchnorm
from egtrain.sharpness.metric import (
    PASS_COST,
    Measured,
    ModelAtCheckpoint,
    Number,
    Panel,
    Parameters,
    SharpnessMetric,
)
from egtrain.sharpness.records import MeasuredRun, Record

WIDE = 10.0
"""Losses that differ by a larger factor are drawn on a logarithmic axis."""


def measure(model: ModelAtCheckpoint, parameters: Parameters) -> Measured:
    """Return the barrier, and loss and metric along the line."""
    loss, batches, forward = model.loss, model.batches, model.task.loss
    path = between(
        loss,
        model.first_weights,
        copied(loss.parameters),
        points=parameters["points"],
        recompute_statistics=lambda: recompute_batchnorm(loss.model, batches, forward),
    )
    curves = {
        "positions": path.positions.tolist(),
        "losses": path.losses.tolist(),
        "metrics": path.metrics.tolist(),
    }
    return {"barrier": barrier(curves["positions"], curves["losses"])}, curves


def barrier(positions: Sequence[float], losses: Sequence[float]) -> float:
    """Return how far the loss between two ends, at positions 0 and 1, rises above the straight line
    between them.
    """
    at = dict(zip(positions, losses, strict=True))
    start, end = (at[min(at, key=lambda p: abs(p - goal))] for goal in (0.0, 1.0))
    inside = [loss - ((1 - p) * start + p * end) for p, loss in at.items() if 0 <= p <= 1]
    return max(inside, default=math.nan)


def numbers(record: Record) -> Iterator[Number]:
    """Yield the barrier."""
    yield Number("barrier", record.values["barrier"])


def rows(record: Record) -> dict[str, str]:
    """Return the barrier."""
    return {"barrier from run 1": number_text(record.values["barrier"])}


def draw(axes: Axes, runs: Sequence[MeasuredRun]) -> None:
    """Draw the loss over the position on the line."""
    paths = {
        number: run.from_first["between"].curves
        for number, run in enumerate(runs)
        if "between" in run.from_first
    }
    for number, curves in paths.items():
        axes.plot(
            curves["positions"],
            curves["losses"],
            color=colour(number),
            linestyle=line_style(number),
        )
    for end in (0, 1):
        axes.axvline(end, color="#444444", linewidth=0.8, linestyle=":")
    losses = [loss for curves in paths.values() for loss in curves["losses"]]
    if max(losses) > WIDE * min(losses) > 0:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title("Loss on the way from run 1 to the others")
    axes.set_xlabel("position: run 1 at 0, the other run at 1")
    axes.set_ylabel("loss (nats)")


METRIC = SharpnessMetric(
    default={"points": 21},
    thorough={"points": 81},
    cost=lambda settings: 2 * PASS_COST * settings["between"]["points"],  # with the statistics
    measure=measure,
    numbers=numbers,
    rows=rows,
    panels=(Panel(draw, picture="sharpness-paths", of_one_run=False),),
    from_first_run=True,
)
