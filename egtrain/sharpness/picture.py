"""The pictures of a comparison: the panels of its metrics, one legend and one title each."""

import math
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from egtrain.config.tasks import USER
from egtrain.figures import STYLE, write_title
from egtrain.sharpness.drawing import draw_over_steps, marker_of, rows_and_columns, style_of
from egtrain.sharpness.metric import Panel
from egtrain.sharpness.metrics import metric_of
from egtrain.sharpness.runs import Comparison, Run

MINIMA, PATHS, TRAINING = PICTURES = ("sharpness", "sharpness-paths", "sharpness-training")
"""File names, without endings."""
PANEL_WIDTH, PANEL_HEIGHT = 4.0, 3.2
"""In inches."""
PANELS_IN_A_ROW = 3
SMALL_SIDE, SMALL_MARGIN, SMALL_TITLE, BAR_WIDTH = 2.6, 0.6, 0.3, 1.2
"""In inches: the largest side, the margin and the title of a small panel; the colour bar."""
LABEL_WIDTH = 60
"""Characters in a line of a legend's label."""


def draw_pictures(comparison: Comparison) -> dict[str, Figure]:
    """Return the pictures by name, without those that would have no panel."""
    runs = comparison.runs
    chosen: dict[str, list[Panel]] = {name: [] for name in PICTURES}
    for name in comparison.settings["metrics"]:
        metric = metric_of(name)
        for panel in metric.panels:
            if panel.of_one_run or len(runs) > 1:
                chosen[panel.picture].append(panel)
        if metric.over_steps and any(len(run.checkpoints) > 1 for run in runs):
            title, error = metric.over_steps
            draw = partial(draw_over_steps, name=name, title=title, error=error)
            chosen[TRAINING].append(Panel(draw))
    return {name: _figure(panels, comparison) for name, panels in chosen.items() if panels}


def _figure(panels: Sequence[Panel], comparison: Comparison) -> Figure:
    """Return a picture: panels and pairs of halves, up to three a row, then the wide panels."""
    runs = comparison.runs
    wide = [panel for panel in panels if panel.width == "row" and len(runs) > 1]
    halves = [panel for panel in panels if panel.width == "half"]
    places = [[panel] for panel in panels if panel not in [*wide, *halves]]
    places += [halves[n : n + 2] for n in range(0, len(halves), 2)]
    columns = math.ceil(len(places) / math.ceil(len(places) / PANELS_IN_A_ROW)) if places else 0
    rows = [places[n : n + columns] for n in range(0, len(places), columns or 1)]

    small_rows, small_columns = rows_and_columns(len(runs))
    needed = small_columns * (SMALL_SIDE + SMALL_MARGIN) + BAR_WIDTH if wide else 0.0
    width = max(PANEL_WIDTH * columns, min(needed, PANEL_WIDTH * PANELS_IN_A_ROW))
    needed = min(needed, width)
    side = (needed - BAR_WIDTH) / small_columns - SMALL_MARGIN
    heights = [PANEL_HEIGHT for _ in rows]
    heights += [(side + SMALL_MARGIN + SMALL_TITLE) * small_rows for _ in wide]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        notes = []
        for number, row in enumerate(rows):
            line = grid[number].subgridspec(1, len(row))
            for column, place in enumerate(row):
                inner = line[column].subgridspec(1, len(place))
                for part, panel in enumerate(place):
                    notes.append(panel.draw(figure.add_subplot(inner[part]), runs))
        for number, panel in enumerate(wide, len(rows)):
            margin = max((width - needed) / 2, 1e-6)
            line = grid[number].subgridspec(1, 3, width_ratios=[margin, needed, margin])
            notes.append(panel.draw(figure.add_subplot(line[1]), runs))
        _add_legend(figure, runs)
    errors = "; ".join(dict.fromkeys(note for note in notes if note))
    write_title(figure, title_of(comparison), *([f"±: {errors}"] if errors else []))
    return figure


def title_of(comparison: Comparison) -> str:
    """Return the title: runs, network, data, seeds, and the number of samples measured on."""
    runs = comparison.runs
    networks, seeds = set(), sorted({run.config.seed for run in runs})
    for run in runs:
        sizes = [f"{name} {v}" for name, v in run.network.items() if isinstance(v, int)]
        networks.add(f"{run.network['name']} ({', '.join(sizes)})")
    kind, colon, file = runs[0].config.data.name.partition(":")
    several = f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"
    parts = [
        f"{len(runs)} runs of " if len(runs) > 1 else "",
        networks.pop() if len(networks) == 1 else "several networks",
        ", " if kind == USER else f" on {kind}{colon}{Path(file).name}, ",
        f"seed {seeds[0]}" if len(seeds) == 1 else several,
        f": sharpness over {comparison.sample['size']:,} training samples",
    ]
    return "".join(parts)


def _add_legend(figure: Figure, runs: Sequence[Run]) -> None:
    """Add a legend below the panels: the runs with their numbers, and the batch sizes."""
    entries = [
        (Line2D([], [], **style_of(n), linewidth=2), f"{n + 1}  {run.label}")
        for n, run in enumerate(runs)
    ]
    markers = {run.config.batch_size: marker_of(run, runs) for run in runs}
    entries += [
        (Line2D([], [], color="#444444", marker=marker, linestyle=""), f"batch of {size:,}")
        for size, marker in sorted(markers.items())
    ]
    labels = [textwrap.fill(label, LABEL_WIDTH) for _, label in entries]
    characters = max(len(line) for label in labels for line in label.splitlines()) + 8
    columns = min(len(labels), max(1, int(figure.get_figwidth() * 13 / characters)))
    # The figure grows by the legend, so that the panels keep their height.
    lines = max(sum(label.count("\n") + 1 for label in labels) / columns, 1)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * math.ceil(lines + 0.5))
    handles = [handle for handle, _ in entries]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.2)
