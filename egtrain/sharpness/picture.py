"""The pictures of a comparison: one colour and line a run in every panel, one legend, the same
scales for all runs.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from egtrain.figures import COLOURS, LINES, MARKERS, STYLE, new_figure, show_percent
from egtrain.progress import FRACTIONS
from egtrain.sharpness.results import MeasuredRun, Record
from egtrain.sharpness.spectrum import Density, density_on

GRID_POINTS = 512
"""Of a density, and of nothing else."""
LEVELS = 9
"""Contour levels of the planes."""
LABEL_WIDTH = 60
"""Characters after which a label of the legend is broken into lines."""
LAMBDA_MAX = r"$\lambda_{\max}$"
RISE = "L − L₀ (nats)"

Panel = Callable[[Axes, Sequence[MeasuredRun]], None]


def minimum_figure(runs: Sequence[MeasuredRun]) -> Figure:
    """Return the picture of the minima: a panel for each pair of metrics that was measured."""
    possible: list[tuple[tuple[str, ...], Panel]] = [
        (("line",), _line_panel),
        (("density",), _density_panel),
        (("eigenvalues", "trace"), _curvature_panel),
        (("average", "worst"), _radius_panel),
        (("eigenvalues",), _test_panel),
        (("plane",), _plane_panel),
    ]
    panels = [
        panel for metrics, panel in possible if any(name in runs[0].records for name in metrics)
    ]
    return _figure(panels or [_loss_panel], runs)


def paths_figure(runs: Sequence[MeasuredRun]) -> Figure | None:
    """Return the picture of the lines between runs and of the ε-sharpness; None where neither was
    measured.
    """
    panels: list[Panel] = []
    if any(run.between for run in runs):
        panels.append(_between_panel)
    if "epsilon" in runs[0].records:
        panels.append(_epsilon_panel)
    return _figure(panels, runs) if panels else None


def training_figure(runs: Sequence[MeasuredRun]) -> Figure | None:
    """Return λ_max and trace over the steps; None where each run has one checkpoint only."""
    if all(len(run.checkpoints) == 1 for run in runs):
        return None
    panels: list[Panel] = []
    if "eigenvalues" in runs[0].records:
        panels.append(
            lambda axes, runs: _over_steps(axes, runs, LAMBDA_MAX, "eigenvalues", _largest)
        )
    if "trace" in runs[0].records:
        panels.append(lambda axes, runs: _over_steps(axes, runs, "Trace", "trace", _trace))
    return _figure(panels, runs) if panels else None


def _figure(panels: Sequence[Panel], runs: Sequence[MeasuredRun]) -> Figure:
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(rows, columns)
    with mpl.rc_context(STYLE):
        for place, panel in zip(axes, panels, strict=False):
            panel(place, runs)
        for place in axes[len(panels) :]:
            place.remove()
        _legend(figure, runs)
    return figure


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _line_style(number: int) -> Any:
    # Past the last colour they start again, each with another line.
    return LINES[(number + number // len(COLOURS)) % len(LINES)]


def _markers(runs: Sequence[MeasuredRun]) -> dict[int, str]:
    """Return the marker of each batch size."""
    sizes = sorted({run.batch_size for run in runs})
    return {size: MARKERS[number % len(MARKERS)] for number, size in enumerate(sizes)}


def _legend(figure: Figure, runs: Sequence[MeasuredRun]) -> None:
    """Put the runs, with their numbers, and the batch sizes under the panels."""
    labels = [
        textwrap.fill(f"{number}  {run.label}", LABEL_WIDTH) for number, run in enumerate(runs, 1)
    ]
    handles = [
        Line2D([], [], color=_colour(n), linestyle=_line_style(n), linewidth=2)
        for n in range(len(runs))
    ]
    for size, marker in _markers(runs).items():
        handles.append(Line2D([], [], color="#444444", marker=marker, linestyle="none"))
        labels.append(f"batch of {size:,}")
    characters = max(len(line) for label in labels for line in label.splitlines()) + 8
    columns = min(len(labels), max(1, int(figure.get_figwidth() * 13 / characters)))
    # The panels keep their height: the legend gets its own.
    lines = max(sum(label.count("\n") + 1 for label in labels) / columns, 1)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * math.ceil(lines + 0.5))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.2)


def _split(axes: Axes, count: int) -> list[Axes]:
    """Put `count` narrow panels in the place of one."""
    place, figure = axes.get_subplotspec(), axes.get_figure()
    assert place is not None
    assert isinstance(figure, Figure)
    axes.remove()
    inner = place.subgridspec(1, count)
    return [figure.add_subplot(inner[0, column]) for column in range(count)]


def _numbered(axes: Axes, runs: Sequence[MeasuredRun]) -> None:
    """Give the horizontal axis one place a run, by its number in the legend."""
    axes.set_xticks(range(len(runs)), [str(number) for number in range(1, len(runs) + 1)])
    axes.set_xlim(-0.6, len(runs) - 0.4)
    axes.grid(axis="x", visible=False)


def _points(
    axes: Axes,
    runs: Sequence[MeasuredRun],
    title: str,
    values: Sequence[float | None],
    errors: Sequence[float],
) -> None:
    markers = _markers(runs)
    for number, (run, value, error) in enumerate(zip(runs, values, errors, strict=True)):
        if value is not None:
            axes.errorbar(
                number,
                value,
                error or None,
                color=_colour(number),
                marker=markers[run.batch_size],
                markersize=6,
                capsize=3,
            )
    _numbered(axes, runs)
    if all(
        value is not None and value > error for value, error in zip(values, errors, strict=True)
    ):
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.set_title(title)


def _line_panel(axes: Axes, runs: Sequence[MeasuredRun]) -> None:
    for number, run in enumerate(runs):
        record = run.records["line"]
        positions = np.asarray(record.curves["positions"])
        rise = np.asarray(record.curves["losses"]) - run.level["train"]["loss"]
        axes.plot(
            positions, rise.mean(axis=0), color=_colour(number), linestyle=_line_style(number)
        )
        if len(rise) > 1:
            axes.fill_between(
                positions,
                rise.min(axis=0),
                rise.max(axis=0),
                color=_colour(number),
                alpha=0.15,
                lw=0,
            )
    directions = len(runs[0].records["line"].curves["losses"])
    several = f"{directions} random directions, mean and range"
    axes.set_title(f"Loss along {several if directions > 1 else 'a random direction'}")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("distance, relative to each filter's norm")
    axes.set_ylabel(RISE)


def _density_panel(axes: Axes, runs: Sequence[MeasuredRun]) -> None:
    densities = [
        Density(
            torch.tensor(r["nodes"], dtype=torch.float64),
            torch.tensor(r["weights"], dtype=torch.float64),
        )
        for r in (run.records["density"].curves for run in runs)
    ]
    low = min(float(d.nodes.min()) for d in densities)
    high = max(float(d.nodes.max()) for d in densities)
    sigma = max(high - low, 1e-12) / 100
    grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, GRID_POINTS, dtype=torch.float64)
    curves = [density_on(d, grid, sigma) for d in densities]
    # Far from every node a sum of Gaussians is zero for all purposes, and a logarithm has no room
    # for that.
    outermost = min(float(d.weights.mean(dim=0)[d.nodes.mean(dim=0).argmax()]) for d in densities)
    top = max(float(c.max()) for c in curves)
    floor = max(outermost / (sigma * math.sqrt(2 * math.pi)) / 10, top * 1e-9)
    for number, curve in enumerate(curves):
        axes.plot(
            grid, curve.clamp(min=floor / 10), color=_colour(number), linestyle=_line_style(number)
        )
    axes.set_yscale("log")
    axes.set_ylim(floor, top * 3)
    axes.set_title("Spectrum of the Hessian")
    axes.set_xlabel(f"eigenvalue (smoothed, σ = {sigma:.2g})")
    axes.set_ylabel("density")


def _curvature_panel(axes: Axes, runs: Sequence[MeasuredRun]) -> None:
    wanted = [
        (name, title, value)
        for name, title, value in (
            ("eigenvalues", LAMBDA_MAX, _largest),
            ("trace", "Trace", _trace),
        )
        if name in runs[0].records
    ]
    for place, (name, title, value) in zip(_split(axes, len(wanted)), wanted, strict=True):
        pairs = [value(run.records[name]) for run in runs]
        _points(place, runs, title, [v for v, _ in pairs], [e for _, e in pairs])
        place.set_xlabel("run")


def _largest(record: Record) -> tuple[float, float]:
    return record.values["largest"][0], record.values["residuals"][0]


def _trace(record: Record) -> tuple[float, float]:
    return record.values["mean"], record.values["standard_error"]


def _radius_panel(axes: Axes, runs: Sequence[MeasuredRun]) -> None:
    names = [name for name in ("average", "worst") if name in runs[0].records]
    markers = _markers(runs)
    places = _split(axes, len(names))
    places[0].set_ylabel("rise of the loss (nats)")
    for place, name in zip(places, names, strict=True):
        radii = runs[0].records[name].values["radii"]
        for number, run in enumerate(runs):
            values = run.records[name].values
            heights = values["mean" if name == "average" else "sharpness"]
            place.errorbar(
                radii,
                # What is not above zero has no place on a logarithmic axis.
                [height if height > 0 else math.nan for height in heights],
                values.get("standard_error"),
                color=_colour(number),
                linestyle=_line_style(number),
                marker=markers[run.batch_size],
                markersize=4,
                capsize=2,
            )
        place.set_xscale("log")
        place.set_yscale("log")
        place.set_xticks(
            radii[:: max(1, len(radii) // 2)], [f"{r:g}" for r in radii[:: max(1, len(radii) // 2)]]
        )
        place.xaxis.set_minor_formatter(NullFormatter())
        place.xaxis.set_minor_locator(LogLocator(subs=()))
        place.set_title("Average" if name == "average" else "Worst")
        place.set_xlabel("adaptive radius ρ")


def _test_panel(axes: Axes, runs: Sequence[MeasuredRun]) -> None:
    split = "test" if all("test" in run.level for run in runs) else "train"
    # That of the training sample may be another one.
    metric = (
        runs[0].metric
        if split == "test"
        else next(name for name in runs[0].level[split] if name != "loss")
    )
    markers = _markers(runs)
    points = []
    for number, run in enumerate(runs):
        x, y = _largest(run.records["eigenvalues"])[0], run.level[split][metric]
        axes.plot(
            x,
            y,
            color=_colour(number),
            marker=markers[run.batch_size],
            markersize=8,
            linestyle="none",
        )
        points.append((x, y))
    axes.margins(0.15)
    _write_numbers(axes, points)
    if metric in FRACTIONS:
        show_percent(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title(f"{split.capitalize()} {metric.replace('_', ' ')} over {LAMBDA_MAX}")
    axes.set_xlabel(LAMBDA_MAX)
    axes.set_ylabel(f"{split} {metric.replace('_', ' ')}")


def _write_numbers(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
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


def _plane_panel(axes: Axes, runs: Sequence[MeasuredRun]) -> None:
    rises = [
        np.asarray(run.records["plane"].curves["losses"]) - run.level["train"]["loss"]
        for run in runs
    ]
    # Equal steps of the root: contours of a parabola are then equally far apart.
    top = float(np.median([rise.max() for rise in rises]))
    levels = np.linspace(0, math.sqrt(max(top, 1e-12)), LEVELS + 1) ** 2
    columns = math.ceil(math.sqrt(len(runs)))
    rows = math.ceil(len(runs) / columns)
    place, figure = axes.get_subplotspec(), axes.get_figure()
    assert place is not None
    assert isinstance(figure, Figure)
    axes.remove()
    outer = place.subgridspec(rows, columns)
    small: list[Axes] = []
    for number, (run, rise) in enumerate(zip(runs, rises, strict=True)):
        inner = figure.add_subplot(outer[number // columns, number % columns])
        positions = run.records["plane"].curves["positions"]
        filled = inner.contourf(
            positions, positions, rise.clip(min=0), levels=levels, cmap="cividis_r", extend="max"
        )
        inner.contour(positions, positions, rise, levels=levels[1:], colors="black", linewidths=0.4)
        inner.plot(0, 0, marker="+", color="black", markersize=5)
        inner.set_aspect("equal")
        inner.grid(visible=False)
        inner.set_xticks([])
        inner.set_yticks([])
        for spine in inner.spines.values():
            spine.set(visible=True, color=_colour(number), linewidth=2)
        inner.set_ylabel(str(number + 1), rotation=0, labelpad=6, va="center")
        small.append(inner)
    bar = figure.colorbar(filled, ax=small, shrink=0.9, format="%.3g", ticks=levels[:: LEVELS // 3])
    bar.set_label(RISE)
    reach = runs[0].records["plane"].curves["positions"][-1]
    # Wider than one small panel, which its title would stretch.
    small[0].set_title(" ")
    title = small[0].annotate(
        f"Loss in a random plane, ± {reach:g}",
        (0, 1),
        xytext=(0, 6),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=mpl.rcParams["axes.titlesize"],
    )
    title.set_in_layout(False)


def _loss_panel(axes: Axes, runs: Sequence[MeasuredRun]) -> None:
    """Show the loss over the frozen sample: what there is where only paths were asked for."""
    _points(
        axes, runs, "Training loss", [run.level["train"]["loss"] for run in runs], [0.0] * len(runs)
    )
    axes.set_xlabel("run")


def _between_panel(axes: Axes, runs: Sequence[MeasuredRun]) -> None:
    for number, run in enumerate(runs):
        if run.between is not None:
            curves = run.between.curves
            axes.plot(
                curves["positions"],
                curves["losses"],
                color=_colour(number),
                linestyle=_line_style(number),
            )
    for end in (0, 1):
        axes.axvline(end, color="#444444", linewidth=0.8, linestyle=":")
    lowest = min(min(run.between.curves["losses"]) for run in runs if run.between is not None)
    if lowest > 0:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title("Loss on the way from run 1 to the others")
    axes.set_xlabel("position: run 1 at 0, the other run at 1")
    axes.set_ylabel("loss (nats)")


def _epsilon_panel(axes: Axes, runs: Sequence[MeasuredRun]) -> None:
    sizes = runs[0].records["epsilon"].values["sizes"]
    places = _split(axes, len(sizes))
    places[0].set_ylabel("ε-sharpness (%)")
    for number, (place, size) in enumerate(zip(places, sizes, strict=True)):
        values = [run.records["epsilon"].values["sharpness"][number] for run in runs]
        _points(place, runs, f"ε = {size:g}", values, [0.0] * len(runs))
        place.set_xlabel("run")


def _over_steps(
    axes: Axes,
    runs: Sequence[MeasuredRun],
    name: str,
    metric: str,
    value: Callable[[Record], tuple[float, float]],
) -> None:
    markers = _markers(runs)
    for number, run in enumerate(runs):
        rows = [(c.step, *value(c.records[metric])) for c in run.checkpoints if metric in c.records]
        steps, heights, errors = zip(*rows, strict=True)
        axes.errorbar(
            steps,
            heights,
            errors,
            color=_colour(number),
            linestyle=_line_style(number),
            marker=markers[run.batch_size],
            markersize=4,
            capsize=2,
        )
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title(f"{name} along training")
    axes.set_xlabel("step")
