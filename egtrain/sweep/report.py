"""What a sweep reports: tables of its plan and results, notes, results.json and results.csv."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from egtrain.disk import write_atomically
from egtrain.formatting import (
    NOTHING,
    count,
    difference_text,
    difference_unit,
    duration,
    learning_rate_text,
    mean_text,
    short_value_text,
)
from egtrain.sweep.cells import Folder, Status
from egtrain.sweep.execution import Speed, estimated_seconds
from egtrain.sweep.plan import FORMAT, LOWEST_FACTOR, Cell, Plan
from egtrain.sweep.results import CellResult, Results, Row
from egtrain.tables import Column, print_line, print_table


def print_plan(
    plan: Plan, folder: Folder, console: Console, jobs: int, speeds: dict[str, Speed] | None
) -> None:
    """Print what a sweep runs, the rule that scales rates, and what is done already."""
    rows = [
        [c for c in plan.cells if (c.preset, c.batch_size) == (preset, batch_size)]
        for preset in plan.presets
        for batch_size in plan.batch_sizes
    ]
    firsts = [cells[0] for cells in rows]
    columns = [
        Column("preset", [cell.preset for cell in firsts], left=True),
        Column("batch", [count(cell.batch_size) for cell in firsts]),
        Column("K", [count(cell.config.workers) for cell in firsts], leave_out=4),
        Column("b", [count(cell.config.worker_batch_size) for cell in firsts], leave_out=5),
        Column("rate", [_each(c.learning_rate for c in cells) for cells in rows], leave_out=1),
    ]
    if any(cell.length for cell in firsts):
        columns.append(Column("shift", [_shift(cells) for cells in rows], leave_out=2))
    columns += [
        Column("epochs", [f"{c.steps / c.steps_per_epoch:.4g}" for c in firsts], leave_out=3),
        Column("steps", [count(cell.steps) for cell in firsts]),
        Column("gradients a run", [count(cell.gradient_evaluations) for cell in firsts]),
        Column("runs", [count(len(cells)) for cells in rows]),
    ]
    if speeds:
        times = [duration(estimated_seconds(cells, speeds, jobs=1)) for cells in rows]
        columns.append(Column("time", times))
    print_table(columns, console)
    for line in (plan.rule, *plan.notes):
        print_line(line, console)
    took = f", about {duration(estimated_seconds(plan.cells, speeds, jobs))}" if speeds else ""
    statuses = {cell.name: folder.status(cell) for cell in plan.cells}
    left = [cell for cell in plan.cells if statuses[cell.name] is Status.waiting]
    more = "; the search may add more" if plan.searches_rates and left else ""
    print_line(
        f"{len(plan.cells)} runs, {jobs} at a time, {_gradients(plan.cells)} gradient "
        f"evaluations{took}{more}",
        console,
    )
    if len(left) < len(plan.cells):
        done = sum(status is Status.done for status in statuses.values())
        failed = len(plan.cells) - done - len(left)
        print_line(
            f"{done} of them are finished{f', {failed} failed' * (failed > 0)}; "
            f"{_gradients(left)} gradient evaluations are left",
            console,
        )


def write_results(results: Results, path: Path) -> None:
    """Write results.json and results.csv; what depends on the clock is under `wall`.

    Raises:
        EgtrainError: they could not be written.
    """
    text = json.dumps(as_json(results), indent=1, allow_nan=False)
    write_atomically(path / "results.json", f"{text}\n".encode())
    rows = [_cell_record(results, result) for result in results.cells]
    wall = [record.pop("wall") for record in rows]
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, [*rows[0], "wall_seconds"], lineterminator="\n")
    writer.writeheader()
    for record, clock in zip(rows, wall, strict=True):
        writer.writerow({**record, "wall_seconds": clock["seconds"]})
    write_atomically(path / "results.csv", written.getvalue().encode())


def as_json(results: Results) -> dict[str, Any]:
    """Return what results.json holds, in fractions, nats and samples."""
    plan = results.plan
    rows = [
        {**asdict(row), "length": None if row.length is None else dict([row.length])}
        for row in results.rows
    ]
    return {
        "format": FORMAT,
        "metric": plan.metric.name,
        "higher_is_better": plan.metric.higher_is_better,
        "selected_on": "validation" if plan.has_grid else None,
        "notes": [plan.rule, *notes_on(results)],
        "target": {
            "value": results.target,
            "split": plan.watched_split,
            "given": results.target_given,
        },
        "noise_scale": None
        if results.noise_scale is None
        else dict(
            zip(("lower_quartile", "median", "upper_quartile"), results.noise_scale, strict=True)
        ),
        "within_percent": results.within_percent,
        "presets": [
            {
                "preset": preset,
                "largest_batch_within": results.largest_batch_within(preset),
                "gradients_per_sample": results.gradients_per_sample(preset),
            }
            for preset in plan.presets
        ],
        "rows": rows,
        "differences": [asdict(difference) for difference in results.differences()],
        "cells": [_cell_record(results, result) for result in results.cells],
    }


def print_results(results: Results, console: Console) -> None:
    """Print the table, the largest batch of each preset, and what a reader must know."""
    plan, rows = results.plan, results.rows
    metric = plan.metric
    columns = [
        Column("preset", [row.preset for row in rows], left=True),
        Column("batch", [count(row.batch_size) for row in rows]),
        Column("K", [count(row.workers) for row in rows], leave_out=5),
        Column(
            "rate",
            [learning_rate_text(row.learning_rate) + _factor(row.rate_factor) for row in rows],
            leave_out=1,
        ),
    ]
    if any(row.length for row in rows):
        shifts = [
            NOTHING if r.length is None else f"{r.length[1]:.3g}{_factor(r.length_factor)}"
            for r in rows
        ]
        columns.append(Column("shift", shifts, leave_out=2))
    if plan.has_grid:
        tried = [count(row.grid_points) for row in rows]
        columns.append(Column("points tried", tried, leave_out=3))
    unit = f" ({difference_unit(metric.unit)})" if difference_unit(metric.unit) else ""
    means = [mean_text(row.mean, row.standard_deviation, metric.unit) for row in rows]
    gaps = ["" if row.gap is None else difference_text(row.gap, metric.unit) for row in rows]
    columns += [
        Column(f"test {metric.label}", means),
        Column(f"gap{unit}", gaps),
        Column("seeds", [f"{r.seeds}" + f", {r.failed} failed" * (r.failed > 0) for r in rows]),
        Column("gradients", [count(row.gradient_evaluations) for row in rows]),
        Column("steps", [count(row.steps) for row in rows], leave_out=4),
    ]
    if results.target is not None:
        target = short_value_text(results.target, metric.unit)
        columns.append(Column(f"steps to {target}", [_to_target(row) for row in rows]))
    print_line("", console)
    print_table(columns, console)
    largest = [
        f"{preset} {NOTHING if (b := results.largest_batch_within(preset)) is None else count(b)}"
        for preset in plan.presets
    ]
    print_line(
        f"Largest batch within {results.within_percent:g} % of the smallest batch's test "
        f"{metric.label}: {', '.join(largest)}.",
        console,
    )
    for line in (*_differences(results), *notes_on(results)):
        print_line(line, console)
    for result in results.cells:
        if result.status is not Status.done:
            print_line(f"{result.cell.name}: {result.status}: {result.message}", console)


def notes_on(results: Results) -> list[str]:
    """Return what a reader of the table must know."""
    plan = results.plan
    notes = list(plan.notes)
    if any(row.standard_deviation is not None for row in results.rows):
        notes.append("After ± and as error bars: the standard deviation over the seeds.")
    if plan.has_grid:
        notes += _notes_on_selection(results)
    costly = [p for p in plan.presets if (results.gradients_per_sample(p) or 1) > 1]
    if costly:
        factors = ", ".join(f"{p} {results.gradients_per_sample(p):.3g}" for p in costly)
        notes.append(f"Gradients a sample: {factors}, all others 1.")
    if results.target is not None:
        target = short_value_text(results.target, plan.metric.unit)
        how = "" if results.target_given else ", the best that every run reaches (see --target)"
        notes.append(f"The target is a {plan.watched_split} {plan.metric.label} of {target}{how}.")
    return notes


def _notes_on_selection(results: Results) -> list[str]:
    """Return how much was tried, and what makes the selection from a grid doubtful."""
    notes = [f"Points of the grid that were tried: {_points_tried(results)}."]
    options = [("length_factor", "--ratio-grid")]
    if results.plan.searches_rates:
        notes += _notes_on_search(results)
    else:
        options.insert(0, ("rate_factor", "--lr-grid"))
    for what, option in options:
        ends = []
        for row in results.rows:
            cells = [
                c
                for c in results.plan.cells
                if (c.preset, c.batch_size) == (row.preset, row.batch_size)
            ]
            factors = {getattr(cell, what) for cell in cells}
            factor = getattr(row, what)
            if len(factors) > 1 and factor in (min(factors), max(factors)) and factor > 0:
                ends.append(f"{row.preset} at {row.batch_size:,} (×{factor:g})")
        if ends:
            notes.append(
                f"Selected at an end of {option}, beyond which there may be a better one: "
                f"{', '.join(ends)}. The same command with further factors runs only those."
            )
    if failed := sum(result.status is Status.failed for result in results.cells):
        waits = ", and their search waits" if results.plan.searches_rates else ""
        notes.append(
            f"Failed runs ({failed}) took no part in the selection{waits}: --retry runs them again."
        )
    return notes


def _points_tried(results: Results) -> str:
    """Return how many points of the grid each preset and batch size was given, in words."""
    numbers = {row.grid_points for row in results.rows}
    if len(numbers) == 1:
        return f"{numbers.pop()} for each preset and batch size"
    return "; ".join(
        f"{preset} "
        + ", ".join(f"{row.grid_points} at {row.batch_size:,}" for row in results.rows_of(preset))
        for preset in results.plan.presets
    )


def _notes_on_search(results: Results) -> list[str]:
    """Return where the search of the learning rate ended without worse rates on both sides."""
    failed = {
        (result.cell.preset, result.cell.batch_size)
        for result in results.cells
        if result.status is Status.failed
    }
    open_rows = [
        row
        for row in results.rows
        if not row.rate_enclosed and (row.preset, row.batch_size) not in failed
    ]
    notes = []
    if lost := [f"{row.preset} at {row.batch_size:,}" for row in open_rows if not row.seeds]:
        notes.append(
            f"No learning rate down to 1/{1 / LOWEST_FACTOR:g} of the scaled one was low enough: "
            f"every run diverged of {', '.join(lost)}."
        )
    if ends := [
        f"{row.preset} at {row.batch_size:,} (×{row.rate_factor:g})"
        for row in open_rows
        if row.seeds
    ]:
        notes.append(
            f"The search ended at its bound, beyond which there may be a better learning rate, or "
            f"one as good: {', '.join(ends)}. Start from another optimizer.lr."
        )
    return notes


def _differences(results: Results) -> list[str]:
    """Return a line for each further preset: how far it differs from the first, by batch size."""
    first, *others = results.plan.presets
    metric = results.plan.metric
    unit = f" in {difference_unit(metric.unit)}" if difference_unit(metric.unit) else ""
    lines = []
    for preset in others:
        parts = []
        for found in results.differences():
            if found.preset == preset:
                text = difference_text(found.mean, metric.unit)
                if found.standard_error is not None:
                    error = difference_text(found.standard_error, metric.unit)
                    text += f" ± {error.removeprefix('+')}"
                parts.append(f"{text} at {count(found.batch_size)}")
        if parts:
            lines.append(
                f"{preset} less {first}, test {metric.label}{unit}, paired by seed, ± standard "
                f"error: {', '.join(parts)}."
            )
    return lines


def _cell_record(results: Results, result: CellResult) -> dict[str, Any]:
    cell, plan = result.cell, results.plan
    tried = {(row.preset, row.batch_size): row.grid_points for row in results.rows}
    steps = None
    if results.target is not None:
        steps = result.steps_to(results.target, plan.metric.higher_is_better)
    return {
        "cell": cell.name,
        "preset": cell.preset,
        "batch_size": cell.batch_size,
        "workers": cell.config.workers,
        "worker_batch_size": cell.config.worker_batch_size,
        "seed": cell.seed,
        "rate_factor": cell.rate_factor,
        "length_factor": cell.length_factor,
        "grid_points": tried[cell.preset, cell.batch_size],
        "learning_rate": cell.learning_rate,
        "length": None if cell.length is None else cell.length[1],
        "status": str(result.status),
        "message": result.message,
        "selected": cell.name in results.selected,
        **{
            f"{split}_{key}": result.metric(split, key)
            for split in dict.fromkeys([plan.watched_split, "test"])
            for key in (plan.metric.name, "loss")
        },
        "steps": result.steps or None,
        "samples": result.samples or None,
        "gradient_evaluations": result.gradient_evaluations or None,
        "steps_to_target": steps,
        "samples_to_target": None if steps is None else steps * cell.batch_size,
        "noise_scale": result.noise_scale,
        "config": cell.digest,
        "wall": {"seconds": result.seconds},
    }


def _each(values: Iterable[float]) -> str:
    """Return each value once."""
    return " ".join(dict.fromkeys(map(learning_rate_text, values)))


def _shift(cells: Sequence[Cell]) -> str:
    lengths = [cell.length for cell in cells if cell.length is not None]
    return f"{lengths[0][0]} {_each(value for _, value in lengths)}" if lengths else NOTHING


def _gradients(cells: Iterable[Cell]) -> str:
    return count(sum(cell.gradient_evaluations for cell in cells))


def _factor(factor: float) -> str:
    return "" if factor == 1 else f" (×{factor:g})"


def _to_target(row: Row) -> str:
    if row.steps_to_target is not None:
        return count(row.steps_to_target)
    return f"{row.reached} of {row.seeds + row.failed} seeds" if row.seeds else NOTHING
