"""The results of a sweep: each cell's numbers, the cells selected from grids, comparisons."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from egtrain.over_seeds import deviation_of, mean_of
from egtrain.sweep.cells import Folder, Status
from egtrain.sweep.plan import Cell, Plan


@dataclass(frozen=True)
class CellResult:
    """A cell and the results of its run."""

    cell: Cell
    status: Status
    message: str = ""
    """How it failed."""
    final: dict[str, dict[str, float | None]] | None = None
    """Metrics of the held-out splits after the last step."""
    curve: tuple[tuple[int, float], ...] = ()
    """Step and metric of each evaluation during training, on `Plan.watched_split`."""
    steps: int = 0
    samples: int = 0
    gradient_evaluations: int = 0
    noise_scale: float | None = None
    """Median over the second half of the run, in samples."""
    seconds: float | None = None
    """Seconds of the run, with evaluations but without the start of the process."""

    def metric(self, split: str, name: str) -> float | None:
        """Return a final metric; None unless the cell finished."""
        return None if self.final is None else self.final.get(split, {}).get(name)

    def steps_to(self, target: float, higher_is_better: bool) -> int | None:
        """Return the step of the first evaluation that reaches the target, or None."""
        return next(
            (s for s, v in self.curve if (v >= target if higher_is_better else v <= target)), None
        )


class Merit(NamedTuple):
    """How good a point of a grid is; of two, the larger one is better."""

    finished: int
    """Seeds whose runs finished, without diverging."""
    validation: float
    """Mean of the validation metric over them, negated if lower is better; -inf without any."""


@dataclass(frozen=True)
class Row:
    """A preset at a batch size, at the selected point of the grid."""

    preset: str
    batch_size: int
    workers: int
    worker_batch_size: int
    learning_rate: float
    rate_factor: float
    length_factor: float
    length: tuple[str, float] | None
    grid_points: int
    """Points of the grid that were tried for this preset and batch size."""
    rate_enclosed: bool | None
    """Whether worse learning rates were tried on both sides of the best; None without a grid of
    them."""
    seeds: int
    """Those that finished."""
    failed: int
    """Those that failed or diverged, at the selected point."""
    mean: float | None
    """Of the test metric over the seeds."""
    standard_deviation: float | None
    gap: float | None
    """The mean minus that of the smallest batch."""
    steps: float | None
    gradient_evaluations: float | None
    """Per-sample gradients of one run."""
    reached: int
    """Seeds that reached the target."""
    steps_to_target: float | None
    """Mean over the seeds; None unless all of them came to the target."""
    samples_to_target: float | None
    gradient_evaluations_to_target: float | None


@dataclass(frozen=True)
class Difference:
    """A preset minus the first one at a batch size, paired by seed, at the selected points."""

    preset: str
    batch_size: int
    seeds: int
    """Those that finished with both presets."""
    mean: float
    """Of the test metric."""
    standard_error: float | None
    """None for a single seed."""


@dataclass(frozen=True)
class Results:
    """What a sweep found."""

    plan: Plan
    cells: tuple[CellResult, ...]
    selected: frozenset[str]
    """Names of the cells that the rows are about."""
    rows: tuple[Row, ...]
    target: float | None
    """On `Plan.watched_split`."""
    target_given: bool
    within_percent: float
    noise_scale: tuple[float, float, float] | None
    """Lower quartile, median and upper quartile over the selected cells, in samples."""

    def rows_of(self, preset: str) -> list[Row]:
        """Return a preset's rows, from the smallest batch to the largest."""
        return [row for row in self.rows if row.preset == preset]

    def selected_cells(self, preset: str, batch_size: int) -> list[CellResult]:
        """Return the finished cells that a row is about, one per seed."""
        return [
            result
            for result in self.cells
            if result.cell.name in self.selected
            and (result.cell.preset, result.cell.batch_size) == (preset, batch_size)
            and result.status is Status.done
        ]

    def largest_batch_within(self, preset: str) -> int | None:
        """Return the largest batch whose mean is within that percentage of the smallest batch's.

        A batch with a failed seed does not count. None if that is the smallest one.
        """
        means = {
            row.batch_size: row.mean
            for row in self.rows_of(preset)
            if row.mean is not None and not row.failed
        }
        smallest = means.get(self.plan.batch_sizes[0])
        if smallest is None:
            return None
        allowed = abs(smallest) * self.within_percent / 100 + 1e-12
        sign = 1 if self.plan.metric.higher_is_better else -1
        return max(b for b, mean in means.items() if sign * (smallest - mean) <= allowed)

    def differences(self) -> list[Difference]:
        """Return how each further preset differs from the first."""
        first, *others = self.plan.presets
        found = []
        for preset in others:
            for batch_size in self.plan.batch_sizes:
                one, other = (self._test_values(name, batch_size) for name in (first, preset))
                pairs = [other[seed] - one[seed] for seed in one if seed in other]
                if pairs:
                    deviation, mean = deviation_of(pairs), statistics.fmean(pairs)
                    error = None if deviation is None else deviation / math.sqrt(len(pairs))
                    found.append(Difference(preset, batch_size, len(pairs), mean, error))
        return found

    def _test_values(self, preset: str, batch_size: int) -> dict[int, float]:
        """Return the final test metric by seed."""
        return {
            result.cell.seed: value
            for result in self.selected_cells(preset, batch_size)
            if (value := result.metric("test", self.plan.metric.name)) is not None
        }

    def gradients_per_sample(self, preset: str) -> float | None:
        """Return how many gradients a preset takes per sample, 1 or more."""
        done = [
            r
            for r in self.cells
            if r.cell.preset == preset and r.status is Status.done and r.samples
        ]
        return done[0].gradient_evaluations / done[0].samples if done else None


def read_results(
    plan: Plan, folder: Folder, *, target: float | None, within_percent: float
) -> Results:
    """Read the results of a sweep's runs and select the best point of each grid."""
    cells = tuple(read_cell(plan, cell, folder) for cell in plan.cells)
    grids = [
        [r for r in cells if (r.cell.preset, r.cell.batch_size) == (preset, batch_size)]
        for preset in plan.presets
        for batch_size in plan.batch_sizes
    ]
    best_points = [_best_point(plan, grid) for grid in grids]
    selected = [result for members in best_points for result in members]
    done = [result for result in selected if result.status is Status.done]
    given = target is not None
    if target is None:
        target = _shared_target([r for r in done if r.curve], plan.metric.higher_is_better)
    rows: list[Row] = []
    for grid, members in zip(grids, best_points, strict=True):
        means = [row.mean for row in rows if row.preset == members[0].cell.preset]
        rows.append(_row(plan, grid, members, target, means[0] if means else None))
    return Results(
        plan=plan,
        cells=cells,
        selected=frozenset(result.cell.name for result in selected),
        rows=tuple(rows),
        target=target,
        target_given=given,
        within_percent=within_percent,
        noise_scale=_quartiles([r.noise_scale for r in done if r.noise_scale is not None]),
    )


def read_cell(plan: Plan, cell: Cell, folder: Folder) -> CellResult:
    """Read the result of a cell."""
    status = folder.status(cell)
    if status is not Status.done:
        message = ""
        if folder.failure(cell).exists():
            message = folder.read_failure(cell)["message"]
        elif (folder.run(cell) / "summary.json").exists():
            message = "a final metric is not a number"
        return CellResult(cell, status, message)
    run = folder.run(cell)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    metric, split = plan.metric.name, plan.watched_split
    curve, scales, seconds = [], [], None
    with (run / "metrics.jsonl").open(encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            seconds = line["wall"]["seconds"]
            if line["split"] == split and line.get(metric) is not None:
                curve.append((line["step"], line[metric]))
            elif (
                line["split"] == "train"
                and 2 * line["step"] >= summary["steps"]
                and line.get("noise_scale")
            ):
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


def _best_point(plan: Plan, results: Sequence[CellResult]) -> list[CellResult]:
    """Return the cells at the best point of a grid, one for each seed.

    The best point has the most finished seeds; of equal ones, the best validation mean over them;
    of equal ones, the learning rate nearest to the scaled one, and then the lower.
    """

    def preference(members: list[CellResult]) -> tuple[Merit, float, float]:
        factor = members[0].cell.rate_factor
        return _merit(plan, members), -abs(math.log(factor)), -factor

    return max(_points(results).values(), key=preference)


def rate_merits(plan: Plan, results: Sequence[CellResult]) -> dict[float, Merit]:
    """Return the merit of each factor of the learning rate, at one length of the extrapolation."""
    return {rate: _merit(plan, members) for (rate, _), members in _points(results).items()}


def _points(results: Sequence[CellResult]) -> dict[tuple[float, float], list[CellResult]]:
    """Return the cells at each point of a grid: by its factors of the rate and the length."""
    points: dict[tuple[float, float], list[CellResult]] = {}
    for result in results:
        point = result.cell.rate_factor, result.cell.length_factor
        points.setdefault(point, []).append(result)
    return points


def _merit(plan: Plan, members: Sequence[CellResult]) -> Merit:
    values = [v for r in members if (v := r.metric("validation", plan.metric.name)) is not None]
    done = sum(result.status is Status.done for result in members)
    sign = 1 if plan.metric.higher_is_better else -1
    return Merit(done, sign * statistics.fmean(values) if values else -math.inf)


def _rate_enclosed(
    plan: Plan, grid: Sequence[CellResult], selected: Sequence[CellResult]
) -> bool | None:
    length = selected[0].cell.length_factor
    merits = rate_merits(plan, [r for r in grid if r.cell.length_factor == length])
    if len(merits) == 1:
        return None
    return max(merits[min(merits)], merits[max(merits)]) < max(merits.values())


def _row(
    plan: Plan,
    grid: Sequence[CellResult],
    members: Sequence[CellResult],
    target: float | None,
    smallest_mean: float | None,
) -> Row:
    cell = members[0].cell
    done = [result for result in members if result.status is Status.done]
    values = [v for r in done if (v := r.metric("test", plan.metric.name)) is not None]
    mean = mean_of(values)
    reached = [
        step
        for result in done
        if target is not None
        and (step := result.steps_to(target, plan.metric.higher_is_better)) is not None
    ]
    steps_to_target = mean_of(reached) if len(reached) == len(members) else None
    gradients = [cell.gradients_until(step) for step in reached]
    return Row(
        preset=cell.preset,
        batch_size=cell.batch_size,
        workers=cell.config.workers,
        worker_batch_size=cell.config.worker_batch_size,
        learning_rate=cell.learning_rate,
        rate_factor=cell.rate_factor,
        length_factor=cell.length_factor,
        length=cell.length,
        grid_points=len(_points(grid)),
        rate_enclosed=_rate_enclosed(plan, grid, members),
        seeds=len(done),
        failed=sum(result.status in (Status.failed, Status.diverged) for result in members),
        mean=mean,
        standard_deviation=deviation_of(values),
        gap=None if mean is None or smallest_mean is None else mean - smallest_mean,
        steps=mean_of([result.steps for result in done]),
        gradient_evaluations=mean_of([result.gradient_evaluations for result in done]),
        reached=len(reached),
        steps_to_target=steps_to_target,
        samples_to_target=None if steps_to_target is None else steps_to_target * cell.batch_size,
        gradient_evaluations_to_target=None if steps_to_target is None else mean_of(gradients),
    )


def _shared_target(results: Sequence[CellResult], higher_is_better: bool) -> float | None:
    """Return the best metric that every run reaches."""
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
