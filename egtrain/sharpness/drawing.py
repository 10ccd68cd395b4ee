"""What the panels of the metrics share: one colour and line a run, its number, and places for
them.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from egtrain.figures import COLOURS, LINES, MARKERS
from egtrain.sharpness.records import MeasuredRun

RISE = "L − L₀ (nats)"
MOST_IN_A_ROW = 5
"""Of small panels."""


def colour(number: int) -> str:
    """Return the colour of the number-th run."""
    return COLOURS[number % len(COLOURS)]


def line_style(number: int) -> Any:
    """Return the line of the number-th run."""
    # Past the last colour they start again, each with another line.
    return LINES[(number + number // len(COLOURS)) % len(LINES)]


def markers_of(runs: Sequence[MeasuredRun]) -> dict[int, str]:
    """Return the marker of each batch size."""
    sizes = sorted({run.batch_size for run in runs})
    return {size: MARKERS[number % len(MARKERS)] for number, size in enumerate(sizes)}


def split(axes: Axes, columns: int, rows: int = 1) -> list[Axes]:
    """Put a grid of small panels in the place of one, and return them row by row."""
    place, figure = axes.get_subplotspec(), axes.get_figure()
    assert place is not None
    assert isinstance(figure, Figure)
    axes.remove()
    inner = place.subgridspec(rows, columns)
    return [
        figure.add_subplot(inner[row, column]) for row in range(rows) for column in range(columns)
    ]


def rows_and_columns(count: int) -> tuple[int, int]:
    """Return the shape of the grid that so many small panels stand in."""
    rows = math.ceil(count / MOST_IN_A_ROW)
    return rows, math.ceil(count / rows)


def split_in_rows(axes: Axes, count: int) -> list[Axes]:
    """Put so many small panels in the place of one, not too many in a row."""
    rows, columns = rows_and_columns(count)
    places = split(axes, columns, rows)
    for spare in places[count:]:
        spare.remove()
    return places[:count]


def draw_points(
    axes: Axes,
    runs: Sequence[MeasuredRun],
    title: str,
    points: Sequence[tuple[float, float]],
) -> None:
    """Draw a value with its error for each run, at its number in the legend."""
    markers = markers_of(runs)
    for number, (run, (value, error)) in enumerate(zip(runs, points, strict=True)):
        axes.errorbar(
            number,
            value,
            error or None,
            color=colour(number),
            marker=markers[run.batch_size],
            markersize=6,
            capsize=3,
        )
    axes.set_xticks(range(len(runs)), [str(number) for number in range(1, len(runs) + 1)])
    axes.set_xlim(-0.6, len(runs) - 0.4)
    axes.grid(axis="x", visible=False)
    if all(value > error for value, error in points):
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.set_title(title)
    axes.set_xlabel("run")


def draw_over_radii(
    axes: Axes,
    runs: Sequence[MeasuredRun],
    title: str,
    points: Sequence[Sequence[tuple[float, float, float]]],
) -> None:
    """Draw each run's (radius, rise of the loss, error) on logarithmic axes."""
    markers = markers_of(runs)
    for number, (run, triples) in enumerate(zip(runs, points, strict=True)):
        radii, rises, errors = zip(*triples, strict=True)
        axes.errorbar(
            radii,
            # What is not above zero has no place on a logarithmic axis.
            [rise if rise > 0 else math.nan for rise in rises],
            errors if any(errors) else None,
            color=colour(number),
            linestyle=line_style(number),
            marker=markers[run.batch_size],
            markersize=4,
            capsize=2,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(radii[0] / 1.15, radii[-1] * 1.15)
    shown = radii[:: max(1, len(radii) // 2)]
    axes.set_xticks(shown, [f"{radius:g}" for radius in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(title)
    axes.set_xlabel("adaptive radius ρ")
    axes.set_ylabel("rise of the loss (nats)")


def write_run_numbers(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Write each point's number beside it, on the side where the others are farthest."""
    axes.autoscale_view()
    box = np.array([axes.viewLim.width or 1.0, axes.viewLim.height or 1.0])
    size = np.array([0.055, 0.07])  # of a digit and its margin, as fractions of the panel
    scaled = [np.array(point) / box for point in points]
    taken = list(scaled)
    for number, (point, place) in enumerate(zip(points, scaled, strict=True), 1):
        sides = [
            np.array([math.cos(a), math.sin(a)]) * size
            for a in np.linspace(0, 2 * math.pi, 12, endpoint=False)
        ]
        best = max(sides, key=lambda s: min(np.linalg.norm((place + s - t) / size) for t in taken))
        taken.append(place + best)
        axes.annotate(
            str(number), point, tuple((place + best) * box), ha="center", va="center", fontsize=8
        )
