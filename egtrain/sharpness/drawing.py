"""What the panels of the metrics share: each run's colour, line and marker, and the layout."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from egtrain.figures import COLOURS, LINES, MARKERS
from egtrain.sharpness.runs import Run

RISE = "L − L₀"
MOST_IN_A_ROW = 5
"""Small panels in a row, at most."""


def style_of(number: int) -> dict[str, Any]:
    """Return the colour and line of a run, by its number."""
    # After the last colour they start again, each with another line.
    line = LINES[(number + number // len(COLOURS)) % len(LINES)]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": line}


def marker_of(run: Run, runs: Sequence[Run]) -> str:
    """Return the marker of a run, which shows its batch size."""
    sizes = sorted({run.config.batch_size for run in runs})
    return MARKERS[sizes.index(run.config.batch_size) % len(MARKERS)]


def rows_and_columns(count: int) -> tuple[int, int]:
    """Return the shape of a grid of `count` small panels."""
    rows = math.ceil(count / MOST_IN_A_ROW)
    return rows, math.ceil(count / rows)


def split(axes: Axes, count: int) -> list[Axes]:
    """Replace a panel by a grid of `count` small ones."""
    place, figure = axes.get_subplotspec(), axes.get_figure()
    assert place is not None
    assert isinstance(figure, Figure)
    axes.remove()
    grid = place.subgridspec(*rows_and_columns(count))
    return [figure.add_subplot(grid[number]) for number in range(count)]


def draw_points(
    axes: Axes, runs: Sequence[Run], points: Sequence[Sequence[tuple[float, float, float | None]]]
) -> None:
    """Draw each run's points: position, value, and error if there is one."""
    for number, (run, triples) in enumerate(zip(runs, points, strict=True)):
        places, values, errors = zip(*triples, strict=True)
        bars = [error or 0.0 for error in errors] if any(errors) else None
        look: dict[str, Any] = {"marker": marker_of(run, runs), "markersize": 5, "capsize": 3}
        axes.errorbar(places, values, bars, **style_of(number), **look)


def draw_values(
    axes: Axes, runs: Sequence[Run], name: str, title: str, error: str = "", row: int = 0
) -> str:
    """Draw one value for each run, at the run's number in the legend."""
    rows = [run.checkpoints[-1].rows(name)[row] for run in runs]
    draw_points(axes, runs, [[(n, r.value, r.error)] for n, r in enumerate(rows, 1)])
    axes.set_xticks(range(1, len(runs) + 1))
    axes.set_xlim(0.4, len(runs) + 0.6)
    axes.grid(axis="x", visible=False)
    if all(r.value > (r.error or 0.0) for r in rows):
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.set(title=title, xlabel="run")
    return note(error, title)


def draw_over_radii(axes: Axes, runs: Sequence[Run], name: str, title: str, error: str = "") -> str:
    """Draw the rise of each run's loss over the radius, on logarithmic axes."""
    rows = [run.checkpoints[-1].rows(name) for run in runs]
    radii = [row.at or 0.0 for row in rows[0]]
    points = [
        # A logarithmic axis has no place for values of zero or less.
        [
            (at, r.value if r.value > 0 else math.nan, r.error)
            for at, r in zip(radii, of_run, strict=True)
        ]
        for of_run in rows
    ]
    draw_points(axes, runs, points)
    axes.set(xscale="log", yscale="log", xlim=(radii[0] / 1.15, radii[-1] * 1.15), title=title)
    shown = radii[:: max(1, len(radii) // 2)]
    axes.set_xticks(shown, [f"{radius:g}" for radius in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="adaptive radius ρ", ylabel="rise of the loss")
    return note(error, title)


def draw_over_steps(axes: Axes, runs: Sequence[Run], name: str, title: str, error: str) -> str:
    """Draw a metric's first value over the training steps."""
    rows = [[(c.step, c.rows(name)[0]) for c in run.checkpoints] for run in runs]
    draw_points(axes, runs, [[(step, r.value, r.error) for step, r in of_run] for of_run in rows])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set(title=f"{title} along training", xlabel="step")
    return note(error, title)


def note(error: str, title: str) -> str:
    """Return what the picture's title says about a panel's error bars, if it has any."""
    return f"{error} ({title.lower()})" if error else ""
