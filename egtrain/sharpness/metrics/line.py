"""The loss along random directions that are normalised filter by filter."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from egtrain.sharpness import landscape, metric
from egtrain.sharpness.drawing import RISE, style_of
from egtrain.sharpness.metric import Measured, MeasuredModel, Panel
from egtrain.sharpness.runs import Run


def measure(model: MeasuredModel, directions: int, points: int, span: float) -> Measured:
    """Return loss and metric along each direction."""
    found = []
    for number in range(directions):
        direction = landscape.filter_normalised_direction(
            model.loss.parameters, metric.SEED, number
        )
        found.append(landscape.line(model.loss, direction, points=points, span=span))
    return {}, {
        "positions": found[0].positions.tolist(),
        "losses": [curve.losses.tolist() for curve in found],
        "metrics": [curve.metrics.tolist() for curve in found],
    }


def draw(axes: Axes, runs: Sequence[Run]) -> str | None:
    """Draw the mean rise over the directions, and its range as a band."""
    for number, run in enumerate(runs):
        curves, style = run.records["line"].curves, style_of(number)
        positions, rise = curves["positions"], np.asarray(curves["losses"]) - run.loss
        axes.plot(positions, rise.mean(axis=0), **style)
        if len(rise) > 1:
            low, high = rise.min(axis=0), rise.max(axis=0)
            axes.fill_between(positions, low, high, color=style["color"], alpha=0.15, lw=0)
    directions = len(runs[0].records["line"].curves["losses"])
    several = f"{directions} random directions"
    axes.set_title(f"Loss along {several if directions > 1 else 'a random direction'}")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set(xlabel="distance, relative to each filter's norm", ylabel=RISE)
    return f"range over the {directions} directions (bands)" if directions > 1 else None


METRIC = metric.SharpnessMetric(
    default={"directions": 3, "points": 21, "span": 1.0},
    thorough={"directions": 5, "points": 51, "span": 1.0},
    cost=lambda p, settings: p["directions"] * p["points"],
    measure=measure,
    panels=(Panel(draw),),
)
