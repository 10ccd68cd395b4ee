"""The loss along random directions that are normalised filter by filter."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from egtrain.sharpness.drawing import RISE, colour, line_style
from egtrain.sharpness.landscape import filter_normalised_direction, line
from egtrain.sharpness.metric import (
    PASS_COST,
    SEED,
    Measured,
    ModelAtCheckpoint,
    Panel,
    Parameters,
    Settings,
    SharpnessMetric,
)
from egtrain.sharpness.records import MeasuredRun


def cost(settings: Settings) -> float:
    """Return the cost of the points of all directions."""
    return float(PASS_COST * settings["line"]["directions"] * settings["line"]["points"])


def measure(model: ModelAtCheckpoint, parameters: Parameters) -> Measured:
    """Return loss and metric along each direction."""
    weights = model.loss.parameters
    curves = [
        line(
            model.loss,
            filter_normalised_direction(weights, SEED, number),
            points=parameters["points"],
            span=parameters["span"],
        )
        for number in range(parameters["directions"])
    ]
    return {}, {
        "positions": curves[0].positions.tolist(),
        "losses": [curve.losses.tolist() for curve in curves],
        "metrics": [curve.metrics.tolist() for curve in curves],
    }


def draw(axes: Axes, runs: Sequence[MeasuredRun]) -> str | None:
    """Draw the mean rise over the directions, and its range as a band."""
    for number, run in enumerate(runs):
        curves = run.records["line"].curves
        positions, rise = np.asarray(curves["positions"]), np.asarray(curves["losses"]) - run.loss
        axes.plot(positions, rise.mean(axis=0), color=colour(number), linestyle=line_style(number))
        if len(rise) > 1:
            low, high = rise.min(axis=0), rise.max(axis=0)
            axes.fill_between(positions, low, high, color=colour(number), alpha=0.15, lw=0)
    directions = len(runs[0].records["line"].curves["losses"])
    several = f"{directions} random directions"
    axes.set_title(f"Loss along {several if directions > 1 else 'a random direction'}")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("distance, relative to each filter's norm")
    axes.set_ylabel(RISE)
    return f"range over the {directions} directions (bands)" if directions > 1 else None


METRIC = SharpnessMetric(
    default={"directions": 3, "points": 21, "span": 1.0},
    thorough={"directions": 5, "points": 51, "span": 1.0},
    cost=cost,
    measure=measure,
    panels=(Panel(draw),),
)
