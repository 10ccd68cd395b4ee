"""The pictures of a comparison: the panels of its metrics, one legend and one title each."""

import math
import textwrap
from collections.abc import Callable, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from egtrain.figures import STYLE, write_title
from egtrain.sharpness.drawing import colour, line_style, markers_of, rows_and_columns
from egtrain.sharpness.metric import OverSteps, Panel
from egtrain.sharpness.metrics import metric_of
from egtrain.sharpness.records import MeasuredRun
from egtrain.sharpness.results import NAME, Comparison

PICTURES = (NAME, f"{NAME}-paths", f"{NAME}-training")
"""Names of the files, without endings: the minima; lines between runs and boxes; along training."""
PANEL_WIDTH, PANEL_HEIGHT = 4.0, 3.2
"""In inches."""
PANELS_IN_A_ROW = 3
SMALL_SIDE, SMALL_MARGIN, SMALL_TITLE, BAR_WIDTH = 2.6, 0.6, 0.3, 1.2
"""In inches: the largest side, the margin and the title of a panel for each run in a row of them,
and what the colour bar takes."""
LABEL_WIDTH = 60
"""Characters after which a label of the legend is broken into lines."""

Draw = Callable[[Axes, Sequence[MeasuredRun]], str | None]


def draw_pictures(comparison: Comparison) -> dict[str, Figure]:
    """Return the pictures by name; none that would have no panel."""
    chosen: dict[str, list[Panel]] = {name: [] for name in PICTURES}
    for name in comparison.settings["metrics"]:
        metric = metric_of(name)
        for panel in metric.panels:
            if panel.of_one_run or len(comparison.runs) > 1:
                chosen[panel.picture].append(panel)
        over_steps = metric.over_steps
        if over_steps and any(len(run.checkpoints) > 1 for run in comparison.runs):
            chosen[f"{NAME}-training"].append(Panel(_along_training(name, over_steps)))
    return {name: _figure(panels, comparison) for name, panels in chosen.items() if panels}


def _figure(panels: Sequence[Panel], comparison: Comparison) -> Figure:
    runs = comparison.runs
    places, wide = _places(panels, len(runs))
    rows = _rows_of(places)
    width = PANEL_WIDTH * max(map(len, rows), default=0)
    small_rows, small_columns = rows_and_columns(len(runs))
    needed = small_columns * (SMALL_SIDE + SMALL_MARGIN) + BAR_WIDTH
    width = max(width, min(needed, PANEL_WIDTH * PANELS_IN_A_ROW)) if wide else width
    needed = min(needed, width)
    side = (needed - BAR_WIDTH) / small_columns - SMALL_MARGIN
    heights = [PANEL_HEIGHT] * len(rows) + [(side + SMALL_MARGIN + SMALL_TITLE) * small_rows] * len(
        wide
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        notes = []
        for number, row in enumerate(rows):
            line = grid[number].subgridspec(1, len(row))
            for column, together in enumerate(row):
                inner = line[column].subgridspec(1, len(together))
                for place, panel in enumerate(together):
                    notes.append(panel.draw(figure.add_subplot(inner[place]), runs))
        for number, panel in enumerate(wide, len(rows)):
            margin = max((width - needed) / 2, 1e-6)
            line = grid[number].subgridspec(1, 3, width_ratios=[margin, needed, margin])
            notes.append(panel.draw(figure.add_subplot(line[1]), runs))
        _legend(figure, runs)
    errors = "; ".join(dict.fromkeys(note for note in notes if note))
    write_title(figure, comparison.title, *([f"±: {errors}"] if errors else []))
    return figure


def _places(panels: Sequence[Panel], runs: int) -> tuple[list[list[Panel]], list[Panel]]:
    """Return what stands in each place, one panel or two halves, and the panels that take a row."""
    places: list[list[Panel]] = []
    wide = []
    half: list[Panel] = []
    for panel in panels:
        if panel.size == "row" and runs > 1:
            wide.append(panel)
        elif panel.size == "half" and len(half) == 1:
            half.append(panel)
        else:
            places.append([panel])
            half = places[-1] if panel.size == "half" else half
    return places, wide


def _rows_of(places: Sequence[list[Panel]]) -> list[list[list[Panel]]]:
    """Return the places in rows that are as equally full as can be."""
    rows: list[list[list[Panel]]] = []
    left, count = list(places), math.ceil(len(places) / PANELS_IN_A_ROW)
    for number in range(count):
        end = math.ceil(len(left) / (count - number))
        rows.append(left[:end])
        left = left[end:]
    return rows


def _along_training(name: str, over_steps: OverSteps) -> Draw:
    def draw(axes: Axes, runs: Sequence[MeasuredRun]) -> str:
        markers = markers_of(runs)
        for number, run in enumerate(runs):
            steps, values, errors = zip(
                *[
                    (checkpoint.step, *over_steps.value(checkpoint.records[name]))
                    for checkpoint in run.checkpoints
                ],
                strict=True,
            )
            axes.errorbar(
                steps,
                values,
                errors,
                color=colour(number),
                linestyle=line_style(number),
                marker=markers[run.batch_size],
                markersize=4,
                capsize=2,
            )
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_title(f"{over_steps.title} along training")
        axes.set_xlabel("step")
        return f"{over_steps.error} ({over_steps.title})"

    return draw


def _legend(figure: Figure, runs: Sequence[MeasuredRun]) -> None:
    """Put the runs, with their numbers, and the batch sizes under the panels."""
    labels = [
        textwrap.fill(f"{number}  {run.label}", LABEL_WIDTH) for number, run in enumerate(runs, 1)
    ]
    handles = [
        Line2D([], [], color=colour(n), linestyle=line_style(n), linewidth=2)
        for n in range(len(runs))
    ]
    for size, marker in markers_of(runs).items():
        handles.append(Line2D([], [], color="#444444", marker=marker, linestyle="none"))
        labels.append(f"batch of {size:,}")
    characters = max(len(line) for label in labels for line in label.splitlines()) + 8
    columns = min(len(labels), max(1, int(figure.get_figwidth() * 13 / characters)))
    # The panels keep their height: the legend gets its own.
    lines = max(sum(label.count("\n") + 1 for label in labels) / columns, 1)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * math.ceil(lines + 0.5))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.2)
