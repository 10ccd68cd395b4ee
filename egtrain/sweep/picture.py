"""The picture of a sweep: final metric, steps and cost to a target, and learning curves.

Steps and samples to a target are the curves of Shallue et al. 2018 (arXiv 1811.03600), the noise
scale is that of McCandlish et al. 2018 (arXiv 1812.06162).
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from egtrain.figures import (
    CHARACTERS_PER_INCH,
    COLOURS,
    LINE_HEIGHT,
    LINES,
    MARKERS,
    STYLE,
    new_figure,
    show_percent,
    write_title,
)
from egtrain.formatting import FRACTION, counted, short_count, short_value_text
from egtrain.sweep.results import CellResult, Results, Row

SPREAD = 1.015
"""Presets are a little apart on the batch-size axis, so that error bars do not overlap."""
MANY_CURVES = 12
"""With more learning curves, only the smallest and the largest batch have one."""
LEGEND_HANDLE = 9
"""Room for the line beside a label, in characters."""
FAR = 4.0
"""A noise scale outside the batch sizes by more than this factor is given in words."""


def picture_of(results: Results) -> Figure:
    """Return the picture; panels that would hold a single point are left out."""
    plan = results.plan
    several = len(plan.batch_sizes) > 1
    panels: list[Callable[[Axes, Results], None]] = []
    if several or len(plan.presets) > 1:
        panels.append(_draw_final if several else _draw_final_by_preset)
    if several and any(row.steps_to_target is not None for row in results.rows):
        panels += [_draw_steps_to_target, _draw_cost_to_target]
    panels.append(_draw_curves)
    columns = min(2, len(panels))
    figure, axes = new_figure(math.ceil(len(panels) / columns), columns, width=4.2, height=3.2)
    with mpl.rc_context(STYLE):
        for place, draw_panel in zip(axes, panels, strict=True):
            draw_panel(place, results)
        _add_legend(figure, results)
    write_title(figure, *_sentences(results))
    return figure


def _sentences(results: Results) -> list[str]:
    """Return what is trained, what ± means, and what else a reader must know."""
    plan, cell = results.plan, results.plan.cells[0]
    length = counted(cell.steps, "step")
    if cell.config.steps is None:
        length = counted(cell.config.epochs, "epoch")
    seeds = len({one.seed for one in plan.cells})
    spread = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    batch = f"batch size {plan.batch_sizes[0]:,}, " if len(plan.batch_sizes) == 1 else ""
    sentences = [f"{cell.config.title}, {batch}{length}, {spread}"]
    if plan.has_grid:
        tried = {row.grid_points for row in results.rows}
        most = f"{min(tried)} to {max(tried)}" if len(tried) > 1 else f"{max(tried)}"
        sentences.append(
            f"Each preset and batch size at the best of {most} grid points, selected on validation"
        )
    if failed := sum(row.failed for row in results.rows):
        sentences.append(f"Without {counted(failed, 'run')} that failed or diverged")
    if results.noise_scale is not None and len(plan.batch_sizes) > 1:
        sentences.append(
            "Noise scale (median and quartiles of the runs): beyond it, larger batches save few "
            "steps"
        )
    return sentences


def _preset_style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
        "linewidth": 1.4,
    }


def _curve_style(place: int) -> dict[str, Any]:
    return {"linestyle": LINES[place], "linewidth": 1.2}


def _shifted(batch_size: float, number: int, count: int) -> float:
    return float(batch_size * SPREAD ** (2 * number - count + 1))


def _draw_final(axes: Axes, results: Results) -> None:
    plan = results.plan
    _prepare_batch_axis(axes, plan.batch_sizes)
    _draw_noise_scale(axes, results)
    for number, preset in enumerate(plan.presets):
        rows = [row for row in results.rows_of(preset) if row.mean is not None]
        axes.errorbar(
            [_shifted(row.batch_size, number, len(plan.presets)) for row in rows],
            [row.mean for row in rows if row.mean is not None],
            yerr=[row.standard_deviation or 0.0 for row in rows],
            capsize=2.5,
            elinewidth=1.0,
            **_preset_style(number),
        )
    _label_metric(axes, results, "test")
    axes.set_title(f"Final test {plan.metric.label}")


def _draw_final_by_preset(axes: Axes, results: Results) -> None:
    """Draw the presets side by side, for a single batch size."""
    for number, row in enumerate(results.rows):
        if row.mean is not None:
            error = row.standard_deviation or 0.0
            axes.errorbar(
                number, row.mean, yerr=error, capsize=2.5, elinewidth=1.0, **_preset_style(number)
            )
    names = [row.preset for row in results.rows]
    axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 2 else 0)
    axes.set_xlim(-0.5, len(names) - 0.5)
    _label_metric(axes, results, "test")
    axes.set_title(f"Final test {results.plan.metric.label}")


def _draw_noise_scale(axes: Axes, results: Results) -> None:
    if results.noise_scale is None:
        return
    low, middle, high = results.noise_scale
    smallest, largest = results.plan.batch_sizes[0], results.plan.batch_sizes[-1]
    # If large batches do worse, this corner stays empty.
    height, side = (0.97, "top") if results.plan.metric.higher_is_better else (0.03, "bottom")
    style: dict[str, Any] = {"fontsize": 7.5, "color": "0.35", "va": side}
    if not smallest / FAR <= middle <= largest * FAR:
        text = f"noise scale ≈ {short_count(middle)}"
        if middle < smallest:
            axes.text(0.02, height, f"← {text}", transform=axes.transAxes, ha="left", **style)
        else:
            axes.text(0.98, height, f"{text} →", transform=axes.transAxes, ha="right", **style)
        return
    axes.axvspan(low, high, color="0.88", linewidth=0, zorder=0)
    axes.axvline(middle, color="0.6", linewidth=0.9, linestyle=(0, (2, 2)), zorder=0.5)
    left, right = axes.get_xlim()
    axes.set_xlim(
        min(left, max(low, smallest / FAR) / 1.15), max(right, min(high, largest * FAR) * 1.15)
    )
    on_the_left = middle > math.sqrt(smallest * largest)
    axes.annotate(
        "noise scale",
        (middle, height),
        xycoords=("data", "axes fraction"),
        xytext=(-3 if on_the_left else 3, 0),
        textcoords="offset points",
        ha="right" if on_the_left else "left",
        **style,
    )


def _draw_steps_to_target(axes: Axes, results: Results) -> None:
    _draw_to_target(axes, results, "steps", lambda row: row.steps_to_target)


def _draw_cost_to_target(axes: Axes, results: Results) -> None:
    twice = any((results.gradients_per_sample(p) or 1) > 1 for p in results.plan.presets)
    what = "gradient evaluations" if twice else "samples"
    _draw_to_target(axes, results, what, lambda row: row.gradient_evaluations_to_target)


def _draw_to_target(
    axes: Axes, results: Results, what: str, value: Callable[[Row], float | None]
) -> None:
    plan = results.plan
    _prepare_batch_axis(axes, plan.batch_sizes)
    axes.set_yscale("log")
    points: list[tuple[int, float]] = []
    for number, preset in enumerate(plan.presets):
        known = [
            (row.batch_size, y) for row in results.rows_of(preset) if (y := value(row)) is not None
        ]
        points += known
        x = [_shifted(batch_size, number, len(plan.presets)) for batch_size, _ in known]
        axes.plot(x, [y for _, y in known], **_preset_style(number))
    first = min(batch_size for batch_size, _ in points)
    best = min(y for batch_size, y in points if batch_size == first)
    ideal = [best * first / b if what == "steps" else best for b in plan.batch_sizes if b >= first]
    if len(ideal) > 1:
        x = [b for b in plan.batch_sizes if b >= first]
        dotted = (0, (1, 1.5))
        (line,) = axes.plot(x, ideal, color="0.5", linewidth=0.9, linestyle=dotted, zorder=1)
        axes.legend(
            [line],
            ["perfect scaling"],
            loc="lower left" if what == "steps" else "upper left",
            fontsize=7.5,
        )
    target = short_value_text(results.target, plan.metric.unit)
    axes.set_ylabel(what)
    axes.set_title(f"{what.capitalize()} to {target} {plan.watched_split} {plan.metric.label}")
    _format_counts(axes, [y for _, y in points] + ideal)


def _draw_curves(axes: Axes, results: Results) -> None:
    plan = results.plan
    batch_sizes = _curve_batch_sizes(results)
    for number, preset in enumerate(plan.presets):
        for place, batch_size in enumerate(batch_sizes):
            cells = [cell for cell in results.selected_cells(preset, batch_size) if cell.curve]
            if not cells:
                continue
            epochs, means, deviations = _mean_curve(cells)
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(epochs, means, color=colour, **_curve_style(place))
            axes.plot(epochs[-1:], means[-1:], **_preset_style(number), clip_on=False)
            if deviations is not None and len(plan.presets) * len(batch_sizes) <= 8:
                low = [m - d for m, d in zip(means, deviations, strict=True)]
                high = [m + d for m, d in zip(means, deviations, strict=True)]
                axes.fill_between(epochs, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("epoch")
    _label_metric(axes, results, plan.watched_split)
    axes.set_title("Learning curves")


def _curve_batch_sizes(results: Results) -> tuple[int, ...]:
    """Return the batch sizes whose learning curves are drawn."""
    plan = results.plan
    batch_sizes = plan.batch_sizes
    if len(plan.presets) * len(batch_sizes) <= MANY_CURVES and len(batch_sizes) <= len(LINES):
        return batch_sizes
    return plan.batch_sizes[0], plan.batch_sizes[-1]


def _mean_curve(cells: Sequence[CellResult]) -> tuple[list[float], list[float], list[float] | None]:
    """Return epochs, mean and standard deviation over the seeds, at the steps they share."""
    curves = [dict(result.curve) for result in cells]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    means = [statistics.fmean(curve[step] for curve in curves) for step in steps]
    deviations = None
    if len(curves) > 1:
        deviations = [statistics.stdev(curve[step] for curve in curves) for step in steps]
    return [step / cells[0].cell.steps_per_epoch for step in steps], means, deviations


def _prepare_batch_axis(axes: Axes, batch_sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(batch_sizes[0] / 1.25, batch_sizes[-1] * 1.25)
    axes.xaxis.set_major_locator(FixedLocator(list(batch_sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    if len(batch_sizes) > 6:
        axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlabel("batch size")


def _label_metric(axes: Axes, results: Results, split: str) -> None:
    axes.set_ylabel(f"{split} {results.plan.metric.label}")
    if results.plan.metric.unit == FRACTION:
        show_percent(axes.yaxis)


def _format_counts(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    margin = max(1.15, (high / low) ** 0.12, 1.6 / (high / low) ** 0.5)
    axes.set_ylim(low / margin, high * margin)
    wide = high / low * margin**2
    few, many = (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    subs = (1.0,) if wide > 1000 else few if wide > 10 else many
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _add_legend(figure: Figure, results: Results) -> None:
    presets, batch_sizes = results.plan.presets, _curve_batch_sizes(results)
    handles = [Line2D([], [], **_preset_style(number)) for number in range(len(presets))]
    labels = []
    for preset in presets:
        cost = results.gradients_per_sample(preset) or 1
        labels.append(preset if cost == 1 else f"{preset} ({cost:.3g} gradients a sample)")
    if len(batch_sizes) > 1:
        styles = map(_curve_style, range(len(batch_sizes)))
        handles += [Line2D([], [], color="0.3", **style) for style in styles]
        labels += [f"learning curve at {batch_size:,}" for batch_size in batch_sizes]
    room = figure.get_figwidth() * CHARACTERS_PER_INCH
    columns = min(max(1, int(room // (max(map(len, labels)) + LEGEND_HANDLE))), 4)
    # The panels keep their height.
    rows = math.ceil(len(labels) / columns)
    figure.set_figheight(figure.get_figheight() + LINE_HEIGHT * rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3)
