"""What came of a sweep: each cell's numbers, the selected cells of each grid, and tables of them."""

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from egtrain.checkpoint import write_atomically
from egtrain.progress import FRACTIONS
from egtrain.sweep.execution import Folder, Status
from egtrain.sweep.plan import FORMAT, Cell, Plan
from egtrain.sweep.text import mean_text, metric_text, target_text


@dataclass(frozen=True)
class CellResult:
    """One cell with what its run left."""

    cell: Cell
    status: Status
    message: str = ""
    """How it failed."""
    final: dict[str, dict[str, float | None]] | None = None
    """Metrics of the held-out splits after the last step."""
    curve: tuple[tuple[int, float], ...] = ()
    """Step and metric of each evaluation on the split that was watched during training."""
    steps: int = 0
    samples: int = 0
    gradient_evaluations: int = 0
    noise_scale: float | None = None
    """Median over the second half of the run, in samples."""
    seconds: float | None = None
    """On the clock of the run, which evaluations are part of and the start of the process is not."""

    def metric(self, split: str, name: str) -> float | None:
        """Return a final metric; None where the cell has not ended well."""
        return None if self.final is None else self.final.get(split, {}).get(name)

    def steps_to(self, target: float, higher_is_better: bool) -> int | None:
        """Return the step of the first evaluation that is as good as the target; None where none was."""
        return next((s for s, v in self.curve if (v >= target if higher_is_better else v <= target)), None)


@dataclass(frozen=True)
class Row:
    """A preset at a batch size, with the selected point of the grid."""

    preset: str
    batch_size: int
    workers: int
    worker_batch_size: int
    learning_rate: float
    rate_factor: float
    length_factor: float
    length: tuple[str, float] | None
    seeds: int
    """That ended well."""
    failed: int
    """Failed and diverged ones, at the selected point."""
    mean: float | None
    """Of the test metric over the seeds."""
    standard_deviation: float | None
    gap: float | None
    """Mean less that of the smallest batch."""
    steps: float | None
    gradient_evaluations: float | None
    """Per-sample gradients of one run."""
    reached: int
    """Seeds that came to the target."""
    steps_to_target: float | None
    """Mean over the seeds; None unless all of them came to the target."""
    samples_to_target: float | None
    gradient_evaluations_to_target: float | None


@dataclass(frozen=True)
class Results:
    """What a sweep found."""

    plan: Plan
    cells: tuple[CellResult, ...]
    selected: frozenset[str]
    """Names of the cells that the rows speak of."""
    rows: tuple[Row, ...]
    curve_split: str
    """The split of the curves and the target."""
    target: float | None
    target_given: bool
    within_percent: float
    noise_scale: tuple[float, float, float] | None
    """Lower quartile, median and upper quartile over the selected cells, in samples."""

    def rows_of(self, preset: str) -> list[Row]:
        """Return a preset's rows, from the smallest batch to the largest."""
        return [row for row in self.rows if row.preset == preset]

    def selected_cells(self, preset: str, batch_size: int) -> list[CellResult]:
        """Return the seeds that a row speaks of and that ended well."""
        return [
            result
            for result in self.cells
            if result.cell.name in self.selected
            and (result.cell.preset, result.cell.batch_size) == (preset, batch_size)
            and result.status is Status.done
        ]

    def largest_batch_within(self, preset: str) -> int | None:
        """Return the largest batch whose mean is at most so many per cent worse than the smallest batch's.

        A batch that a seed did not survive is none of them; nor is anything, if it is the smallest one.
        """
        rows = [row for row in self.rows_of(preset) if row.mean is not None and not row.failed]
        if not rows or rows[0].batch_size != self.plan.batch_sizes[0] or rows[0].mean is None:
            return None
        allowed = abs(rows[0].mean) * self.within_percent / 100
        sign = 1 if self.plan.higher_is_better else -1
        good = [row for row in rows if row.mean is not None and sign * (row.mean - rows[0].mean) >= -allowed - 1e-12]
        return max(row.batch_size for row in good)

    def gradients_per_sample(self, preset: str) -> float | None:
        """Return how many gradients a preset takes of a sample, a whole number or a fraction above one."""
        done = [r for r in self.cells if r.cell.preset == preset and r.status is Status.done and r.samples]
        return done[0].gradient_evaluations / done[0].samples if done else None


def read_results(plan: Plan, folder: Folder, *, target: float | None, within_percent: float) -> Results:
    """Read what the runs of a sweep have left and select the best point of each grid."""
    cells = tuple(_read_cell(cell, folder, plan.metric) for cell in plan.cells)
    selected = frozenset(name for key in _row_keys(plan) for name in _selected(plan, cells, *key))
    chosen = [result for result in cells if result.cell.name in selected and result.status is Status.done]
    given = target is not None
    if target is None:
        target = _shared_target([result for result in chosen if result.curve], plan.higher_is_better)
    rows: list[Row] = []
    for preset, batch_size in _row_keys(plan):
        members = [
            r for r in cells if r.cell.name in selected and (r.cell.preset, r.cell.batch_size) == (preset, batch_size)
        ]
        smallest = next((r for r in rows if r.preset == preset and r.batch_size == plan.batch_sizes[0]), None)
        rows.append(_row(plan, members, target, smallest))
    scales = [result.noise_scale for result in chosen if result.noise_scale is not None]
    return Results(
        plan=plan,
        cells=cells,
        selected=selected,
        rows=tuple(rows),
        curve_split=_watched_split(plan.cells[0]),
        target=target,
        target_given=given,
        within_percent=within_percent,
        noise_scale=_quartiles(scales),
    )


def write_results(results: Results, path: Path) -> None:
    """Write results.json and results.csv into a folder; what depends on the clock is under `wall` or in wall_seconds.

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
        "notes": [plan.rule, *plan.notes],
        "target": {"value": results.target, "split": results.curve_split, "given": results.target_given},
        "noise_scale": None
        if results.noise_scale is None
        else dict(zip(("lower_quartile", "median", "upper_quartile"), results.noise_scale, strict=True)),
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
                lambda row: "–" if row.length is None else f"{row.length[1]:.3g}{_factor(row.length_factor)}",
            )
        )
    unit = " (points)" if name in FRACTIONS else ""
    columns += [
        (f"test {name}", lambda row: mean_text(name, row.mean, row.standard_deviation)),
        (f"gap{unit}", lambda row: "" if row.gap is None else metric_text(name, row.gap, signed=True)),
        ("seeds", lambda row: str(row.seeds) + (f", {row.failed} failed" if row.failed else "")),
        ("gradients", lambda row: _count(row.gradient_evaluations)),
        ("steps", lambda row: _count(row.steps)),
    ]
    if results.target is not None:
        columns.append((f"steps to {target_text(name, results.target)}", lambda row: _to_target(row)))
    table = Table(box=None, pad_edge=False)
    for number, (title, _) in enumerate(columns):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    for row in results.rows:
        table.add_row(*(Text(cell(row)) for _, cell in columns))
    console.print(table)
    for preset in plan.presets:
        largest = results.largest_batch_within(preset)
        said = "no result" if largest is None else f"{largest:,}"
        console.print(
            f"largest batch within {results.within_percent:g} % of the smallest batch's test {name}, {preset}: {said}",
            soft_wrap=True,
        )
    for note in notes_on(results):
        console.print(note, soft_wrap=True)
    for result in results.cells:
        if result.status is not Status.done:
            console.print(f"{result.cell.name}: {result.status}: {result.message}", soft_wrap=True, markup=False)


def notes_on(results: Results) -> list[str]:
    """Return what a reader of the table has to know."""
    plan = results.plan
    notes = list(plan.notes)
    costly = [p for p in plan.presets if (results.gradients_per_sample(p) or 1) > 1]
    if costly:
        factors = ", ".join(f"{p} {results.gradients_per_sample(p):.3g}" for p in costly)
        notes.append(f"Gradients a sample: {factors}, all others 1.")
    if results.target is not None:
        what = target_text(plan.metric, results.target)
        how = "" if results.target_given else ", the best that every run reaches (--target sets another)"
        notes.append(f"The target is a {results.curve_split} {plan.metric} of {what}{how}.")
    return notes


def _read_cell(cell: Cell, folder: Folder, metric: str) -> CellResult:
    status = folder.status(cell)
    if status is not Status.done:
        message = "a final metric is not a number" if (folder.run(cell) / "summary.json").exists() else ""
        if folder.failure(cell).exists():
            message = folder.read_failure(cell)["message"]
        return CellResult(cell, status, message)
    run = folder.run(cell)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    curve, scales, seconds = [], [], None
    split = _watched_split(cell)
    with (run / "metrics.jsonl").open(encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            seconds = line["wall"]["seconds"]
            if line["split"] == split and line.get(metric) is not None:
                curve.append((line["step"], line[metric]))
            elif line["split"] == "train" and 2 * line["step"] >= summary["steps"] and line.get("noise_scale"):
                scales.append(line["noise_scale"])
    return CellResult(
        cell=cell,
        status=status,
        final=summary["final"],
        curve=tuple(curve),
        steps=summary["steps"],
        samples=summary["samples"],
        gradient_evaluations=summary["gradient_evaluations"],
        noise_scale=statistics.median(scales) if scales else None,
        seconds=seconds,
    )


def _watched_split(cell: Cell) -> str:
    """Return the split that a run is evaluated on during training."""
    return "validation" if cell.config.has_validation else "test"


def _row_keys(plan: Plan) -> list[tuple[str, int]]:
    return [(preset, batch_size) for preset in plan.presets for batch_size in plan.batch_sizes]


def _selected(plan: Plan, cells: Iterable[CellResult], preset: str, batch_size: int) -> list[str]:
    """Return the names of the cells at the best point of a grid.

    The best has the most seeds that ended well, then the best mean over them on the validation split.
    """
    points: dict[tuple[float, float], list[CellResult]] = {}
    for result in cells:
        if (result.cell.preset, result.cell.batch_size) == (preset, batch_size):
            points.setdefault((result.cell.rate_factor, result.cell.length_factor), []).append(result)

    def merit(members: list[CellResult]) -> tuple[int, float]:
        values = [v for r in members if (v := r.metric("validation", plan.metric)) is not None]
        done = sum(result.status is Status.done for result in members)
        sign = 1 if plan.higher_is_better else -1
        return done, sign * statistics.fmean(values) if values else -math.inf

    return [result.cell.name for result in max(points.values(), key=merit)]


def _row(plan: Plan, members: Sequence[CellResult], target: float | None, smallest: Row | None) -> Row:
    cell = members[0].cell
    done = [result for result in members if result.status is Status.done]
    values = [v for r in done if (v := r.metric("test", plan.metric)) is not None]
    mean = statistics.fmean(values) if values else None
    found = [r.steps_to(target, plan.higher_is_better) for r in done] if target is not None else []
    reached = [steps for steps in found if steps is not None]
    all_came = len(reached) == len(members)
    return Row(
        preset=cell.preset,
        batch_size=cell.batch_size,
        workers=cell.config.workers,
        worker_batch_size=cell.config.worker_batch_size,
        learning_rate=cell.learning_rate,
        rate_factor=cell.rate_factor,
        length_factor=cell.length_factor,
        length=cell.length,
        seeds=len(done),
        failed=sum(result.status in (Status.failed, Status.diverged) for result in members),
        mean=mean,
        standard_deviation=statistics.stdev(values) if len(values) > 1 else None,
        gap=None if mean is None or smallest is None or smallest.mean is None else mean - smallest.mean,
        steps=statistics.fmean(r.steps for r in done) if done else None,
        gradient_evaluations=statistics.fmean(r.gradient_evaluations for r in done) if done else None,
        reached=len(reached),
        steps_to_target=statistics.fmean(reached) if all_came else None,
        samples_to_target=statistics.fmean(reached) * cell.batch_size if all_came else None,
        gradient_evaluations_to_target=statistics.fmean(map(cell.gradients_until, reached)) if all_came else None,
    )


def _shared_target(results: Sequence[CellResult], higher_is_better: bool) -> float | None:
    """Return the best value that every run reaches."""
    if not results:
        return None
    if higher_is_better:
        return min(max(value for _, value in result.curve) for result in results)
    return max(min(value for _, value in result.curve) for result in results)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float] | None:
    if not values:
        return None
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _cell_record(results: Results, result: CellResult) -> dict[str, Any]:
    cell, name = result.cell, results.plan.metric
    steps = None if results.target is None else result.steps_to(results.target, results.plan.higher_is_better)
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
