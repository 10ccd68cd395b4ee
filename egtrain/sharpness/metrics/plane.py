"""The loss in the plane of two random directions that are normalised filter by filter."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm

from egtrain.sharpness import landscape, metric
from egtrain.sharpness.drawing import RISE, split, style_of
from egtrain.sharpness.metric import Measured, MeasuredModel, Panel
from egtrain.sharpness.runs import Run

LEVELS = 9
"""Contours above the loss of the minimum."""


def measure(model: MeasuredModel, points: int, span: float) -> Measured:
    """Return loss and metric on the plane."""
    weights = model.loss.parameters
    first, second = (
        landscape.filter_normalised_direction(weights, metric.SEED, number) for number in (0, 1)
    )
    found = landscape.plane(model.loss, first, second, points=points, span=span)
    return {}, {name: tensor.tolist() for name, tensor in vars(found).items()}


def round_levels(top: float) -> list[float]:
    """Return zero and 1, 2 and 5 times powers of ten, up to about `top`.

    The contours of a parabola are then nearly equally spaced.
    """
    top = max(top, 1e-12)
    power = math.floor(math.log10(top))
    numbers = [float(f"{d}e{exponent}") for exponent in range(power - 4, power + 1) for d in "125"]
    return [0.0, *[number for number in numbers if number <= top][-LEVELS:]]


def draw(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw the contours of each run, in the same levels and colours."""
    curves = [run.records["plane"].curves for run in runs]
    rises = [np.asarray(c["losses"]) - run.loss for c, run in zip(curves, runs, strict=True)]
    levels = round_levels(float(np.median([rise.max() for rise in rises])))
    lower = min(float(rise.min()) for rise in rises) < -levels[1]
    extend: Literal["both", "max"] = "both" if lower else "max"
    colours = mpl.colormaps["cividis_r"].with_extremes(under="white")
    look: dict[str, Any] = {"levels": levels, "cmap": colours, "extend": extend}
    look["norm"] = BoundaryNorm(levels, colours.N, extend=extend)
    positions, reach = curves[0]["positions"], curves[0]["positions"][-1]
    ticks = [-reach, 0, reach]
    places = split(axes, len(runs))
    for number, (place, rise) in enumerate(zip(places, rises, strict=True)):
        shown = rise if lower else rise.clip(min=0)
        filled = place.contourf(positions, positions, shown, **look)
        inside = [level for level in levels if rise.min() < level < rise.max()]
        if inside:
            place.contour(positions, positions, rise, levels=inside, colors="black", linewidths=0.4)
        place.plot(0, 0, marker="+", color="black", markersize=6)
        place.set_aspect("equal")
        place.grid(visible=False)
        place.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        place.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        place.set_title(f"Run {number + 1}, random plane")
        for spine in place.spines.values():
            spine.set(visible=True, color=style_of(number)["color"], linewidth=2)
    places[0].set_ylabel("second direction")
    places[0].set_xlabel("first direction")
    figure = places[0].get_figure()
    assert figure is not None
    bar = figure.colorbar(filled, ax=places, ticks=levels, format="%g", pad=0.02, aspect=25)
    bar.ax.minorticks_off()
    bar.set_label(f"{RISE}\nwhite: below L₀" if lower else RISE)


METRIC = metric.SharpnessMetric(
    default={"points": 11, "span": 1.0},
    thorough={"points": 51, "span": 1.0},
    cost=lambda p, settings: p["points"] ** 2,
    measure=measure,
    panels=(Panel(draw, width="row"),),
)
