"""The loss in the plane of two random directions that are normalised filter by filter."""

import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm

from egtrain.sharpness.drawing import RISE, colour, split_in_rows
from egtrain.sharpness.landscape import filter_normalised_direction, plane
from egtrain.sharpness.metric import (
    PASS_COST,
    SEED,
    Measured,
    ModelAtCheckpoint,
    Panel,
    Parameters,
    SharpnessMetric,
)
from egtrain.sharpness.records import MeasuredRun

LEVELS = 9
"""Contours above the loss of the minimum."""


def measure(model: ModelAtCheckpoint, parameters: Parameters) -> Measured:
    """Return loss and metric on the plane."""
    weights = model.loss.parameters
    first, second = (filter_normalised_direction(weights, SEED, number) for number in (0, 1))
    found = plane(model.loss, first, second, points=parameters["points"], span=parameters["span"])
    return {}, {
        "positions": found.positions.tolist(),
        "losses": found.losses.tolist(),
        "metrics": found.metrics.tolist(),
    }


def round_levels(top: float) -> list[float]:
    """Return zero and the numbers 1, 2 and 5 times powers of ten up to about `top`.

    Contours of a parabola are then nearly equally far apart.
    """
    power = math.floor(math.log10(max(top, 1e-12)))
    numbers = [
        float(f"{digit}e{exponent}") for exponent in range(power - 4, power + 1) for digit in "125"
    ]
    return [0.0, *[number for number in numbers if number <= max(top, 1e-12)][-LEVELS:]]


def draw(axes: Axes, runs: Sequence[MeasuredRun]) -> None:
    """Draw the contours of each run, in the same levels and colours."""
    rises = [np.asarray(run.records["plane"].curves["losses"]) - run.loss for run in runs]
    levels = round_levels(float(np.median([rise.max() for rise in rises])))
    lower = min(float(rise.min()) for rise in rises) < -levels[1]
    colours = mpl.colormaps["cividis_r"].with_extremes(under="white")
    norm = BoundaryNorm(levels, colours.N, extend="both" if lower else "max")
    places = split_in_rows(axes, len(runs))
    for number, (place, run, rise) in enumerate(zip(places, runs, rises, strict=True)):
        positions = run.records["plane"].curves["positions"]
        filled = place.contourf(
            positions,
            positions,
            rise if lower else rise.clip(min=0),
            levels=levels,
            cmap=colours,
            norm=norm,
            extend="both" if lower else "max",
        )
        inside = [level for level in levels if rise.min() < level < rise.max()]
        if inside:
            place.contour(positions, positions, rise, levels=inside, colors="black", linewidths=0.4)
        place.plot(0, 0, marker="+", color="black", markersize=6)
        place.set_aspect("equal")
        place.grid(visible=False)
        reach = positions[-1]
        place.set_xticks([-reach, 0, reach], [f"{-reach:g}", "0", f"{reach:g}"])
        place.set_yticks([-reach, 0, reach], [f"{-reach:g}", "0", f"{reach:g}"])
        place.set_title(f"Run {number + 1}, random plane")
        for spine in place.spines.values():
            spine.set(visible=True, color=colour(number), linewidth=2)
    places[0].set_ylabel("second direction")
    places[0].set_xlabel("first direction")
    figure = places[0].get_figure()
    assert figure is not None
    bar = figure.colorbar(filled, ax=places, ticks=levels, format="%g", pad=0.02, aspect=25)
    bar.ax.minorticks_off()
    bar.set_label(f"{RISE}\nwhite: below L₀" if lower else RISE)


METRIC = SharpnessMetric(
    default={"points": 11, "span": 1.0},
    thorough={"points": 51, "span": 1.0},
    cost=lambda settings: PASS_COST * settings["plane"]["points"] ** 2,
    measure=measure,
    panels=(Panel(draw, size="row"),),
)
