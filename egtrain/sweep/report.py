"""What a sweep tells of its results: a table with notes, results.json and results.csv."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from egtrain.checkpoint import write_atomically
from egtrain.progress import FRACTIONS
from egtrain.sweep.execution import Status
from egtrain.sweep.plan import FORMAT
from egtrain.sweep.results import CellResult, Results, Row
from egtrain.sweep.text import mean_text, metric_text, target_text


def write_results(results: Results, path: Path) -> None:
    """Write results.json and results.csv into a folder; what depends on the clock is under `wall`
    or in wall_seconds.

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
    """Return what results.json holds; fractions, nats and samples."""
    plan = results.plan
    rows = []
    for row in results.rows:
        record = asdict(row)
        record["length"] = None if row.length is None else {row.length[0]: row.length[1]}
        rows.append(record)
    return {
        "format": FORMAT,
        "metric": plan.metric,
        "higher_is_better": plan.higher_is_better,
        "selected_on": "validation" if plan.has_grid else None,
        "notes": [plan.rule, *notes_on(results)],
        "target": {
            "value": results.target,
            "split": results.curve_split,
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
    """Print the table, the largest batch of each preset, and what a reader has to know."""
    plan = results.plan
    name = plan.metric
    lengths = [row for row in results.rows if row.length is not None]
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("preset", lambda row: row.preset),
        ("batch", lambda row: f"{row.batch_size:,}"),
        ("K", lambda row: str(row.workers)),
        ("rate", lambda row: f"{row.learning_rate:.4g}" + _factor(row.rate_factor)),
    ]
    if lengths:
        columns.append(
            (
                "shift",
                lambda row: (
                    "–"
                    if row.length is None
                    else f"{row.length[1]:.3g}{_factor(row.length_factor)}"
                ),
            )
        )
    unit = " (points)" if name in FRACTIONS else ""
    columns += [
        (f"test {name}", lambda row: mean_text(name, row.mean, row.standard_deviation)),
        (
            f"gap{unit}",
            lambda row: "" if row.gap is None else metric_text(name, row.gap, signed=True),
        ),
        ("seeds", lambda row: str(row.seeds) + (f", {row.failed} failed" if row.failed else "")),
        ("gradients", lambda row: _count(row.gradient_evaluations)),
        ("steps", lambda row: _count(row.steps)),
    ]
    if results.target is not None:
        columns.append(
            (f"steps to {target_text(name, results.target)}", lambda row: _to_target(row))
        )
    table = Table(box=None, pad_edge=False)
    for number, (title, _) in enumerate(columns):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    for row in results.rows:
        table.add_row(*(Text(cell(row)) for _, cell in columns))
    console.print(table)
    for line in _differences(results):
        console.print(line, soft_wrap=True)
    for preset in plan.presets:
        largest = results.largest_batch_within(preset)
        said = "no result" if largest is None else f"{largest:,}"
        console.print(
            f"largest batch within {results.within_percent:g} % of the smallest batch's test "
            f"{name}, {preset}: {said}",
            soft_wrap=True,
        )
    for note in notes_on(results):
        console.print(note, soft_wrap=True)
    for result in results.cells:
        if result.status is not Status.done:
            console.print(
                f"{result.cell.name}: {result.status}: {result.message}",
                soft_wrap=True,
                markup=False,
            )


def notes_on(results: Results) -> list[str]:
    """Return what a reader of the table has to know."""
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
        what = target_text(plan.metric, results.target)
        how = (
            ""
            if results.target_given
            else ", the best that every run reaches (--target sets another)"
        )
        notes.append(f"The target is a {results.curve_split} {plan.metric} of {what}{how}.")
    return notes


def _notes_on_selection(results: Results) -> list[str]:
    """Return what makes the selection of a grid's points doubtful."""
    notes = []
    for what, option in (("rate_factor", "--lr-grid"), ("length_factor", "--ratio-grid")):
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
                f"{', '.join(ends)}. "
                "The same command with further factors runs only those."
            )
    if failed := sum(result.status is Status.failed for result in results.cells):
        notes.append(
            f"Failed runs ({failed}) took no part in the selection: --retry runs them again."
        )
    return notes


def _differences(results: Results) -> list[str]:
    """Return a line for each preset after the first: how much better or worse it is than that, by
    batch size.
    """
    name = results.plan.metric
    lines = []
    for preset in results.plan.presets[1:]:
        parts = []
        for found in results.differences():
            if found.preset == preset:
                error = (
                    ""
                    if found.standard_error is None
                    else f" ± {metric_text(name, found.standard_error)}"
                )
                mean = metric_text(name, found.mean, signed=True)
                parts.append(f"{mean}{error.removesuffix(' %')} at {found.batch_size:,}")
        if parts:
            unit = " in points" if name in FRACTIONS else ""
            lines.append(
                f"{preset} less {results.plan.presets[0]}, test {name}{unit}, paired by seed, ± "
                "standard error: "
                f"{', '.join(parts)}"
            )
    return lines


def _cell_record(results: Results, result: CellResult) -> dict[str, Any]:
    cell, name = result.cell, results.plan.metric
    steps = (
        None
        if results.target is None
        else result.steps_to(results.target, results.plan.higher_is_better)
    )
    return {
        "cell": cell.name,
        "preset": cell.preset,
        "batch_size": cell.batch_size,
        "workers": cell.config.workers,
        "worker_batch_size": cell.config.worker_batch_size,
        "seed": cell.seed,
        "rate_factor": cell.rate_factor,
        "length_factor": cell.length_factor,
        "learning_rate": cell.learning_rate,
        "length": None if cell.length is None else cell.length[1],
        "status": str(result.status),
        "message": result.message,
        "selected": cell.name in results.selected,
        **{
            f"{split}_{key}": result.metric(split, key)
            for split in dict.fromkeys([results.curve_split, "test"])
            for key in (name, "loss")
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


def _factor(factor: float) -> str:
    return "" if factor == 1 else f" (×{factor:g})"


def _count(number: float | None) -> str:
    return "–" if number is None else f"{number:,.0f}"


def _to_target(row: Row) -> str:
    if row.steps_to_target is not None:
        return f"{row.steps_to_target:,.0f}"
    return f"{row.reached} of {row.seeds + row.failed} seeds" if row.seeds else "–"
