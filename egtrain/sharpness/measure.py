"""What is measured, with which numbers and in which order; each finished metric is stored before
the next begins.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import torch
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from egtrain.checkpoint import read_checkpoint
from egtrain.distributed import StoppedEarly, agreed, only_first_rank
from egtrain.errors import UsageError, did_you_mean
from egtrain.evaluate import evaluate
from egtrain.progress import can_redraw, duration
from egtrain.sharpness.adaptive import average_sharpness, epsilon_sharpness, worst_sharpness
from egtrain.sharpness.frozen_loss import FrozenLoss
from egtrain.sharpness.landscape import (
    between,
    filter_normalised_direction,
    line,
    plane,
    recompute_batchnorm,
)
from egtrain.sharpness.results import (
    LEVEL,
    Comparison,
    MeasuredCheckpoint,
    MeasuredRun,
    Record,
    Records,
    RecordStore,
    barrier,
)
from egtrain.sharpness.spectrum import Krylov, density, eigenvalues, trace
from egtrain.sharpness.subjects import FrozenSample, Subject, digest_of, load_checkpoint_into
from egtrain.tasks import Task
from egtrain.workers import Ranks, sum_over_ranks

Parameters = dict[str, Any]

AVERAGE_RADII = [0.05, 0.08, 0.14, 0.24, 0.4]
WORST_RADII = [0.25, 0.42, 0.7, 1.2, 2.0]
"""Even on a logarithmic axis, over the ranges that arXiv 2302.07011 publishes for ResNets."""

METRICS: dict[str, tuple[Parameters, Parameters]] = {
    "eigenvalues": ({"count": 1, "steps": 20}, {"count": 10, "steps": 80}),
    "density": ({"vectors": 1, "steps": 50}, {"vectors": 10, "steps": 90}),
    "trace": ({"samples": 30}, {"samples": 200}),
    "line": (
        {"directions": 3, "points": 21, "span": 1.0},
        {"directions": 5, "points": 51, "span": 1.0},
    ),
    "plane": ({"points": 11, "span": 1.0}, {"points": 51, "span": 1.0}),
    "average": ({"radii": AVERAGE_RADII, "samples": 10}, {"radii": AVERAGE_RADII, "samples": 100}),
    "worst": (
        {"radii": WORST_RADII, "steps": 20, "restarts": 1},
        {"radii": WORST_RADII, "steps": 20, "restarts": 3},
    ),
    "epsilon": ({"sizes": [1e-3], "iterations": 10}, {"sizes": [1e-3, 5e-4], "iterations": 10}),
    "between": ({"points": 21}, {"points": 81}),
}
"""Every metric with its parameters, by default and with --thorough, in the order of measuring."""
ALONG_TRAINING = ("eigenvalues", "trace")
"""What is measured of the checkpoints before the compared one."""
SEED = 0
"""Of every random vector: all runs share them, so that differences between runs are not those of
draws."""

GRADIENT_COST, PRODUCT_COST = 3.0, 10.0
"""In evaluations of the loss, for the time left: measured with a ResNet on a CPU."""


def settings_of(names: Sequence[str] | None, thorough: bool, runs: int) -> dict[str, Parameters]:
    """Return the parameters of the metrics that were asked for; by default all that the number of
    runs allows.

    Raises:
        UsageError: a metric is unknown, named twice or impossible.
    """
    if names is None:
        names = [name for name in METRICS if name != "between" or runs > 1]
    if not names:
        raise UsageError(f"--metrics names nothing to measure: choose from {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            hint = did_you_mean(name, list(METRICS)) or f"; choose from {', '.join(METRICS)}"
            raise UsageError(f"unknown metric {name!r}{hint}")
        if list(names).count(name) > 1:
            raise UsageError(f"--metrics names {name} twice: name it once")
    if "between" in names and runs < 2:
        raise UsageError(
            "between is the line between two runs: name a second run, or leave it out of --metrics"
        )
    settings = {name: dict(both[thorough]) for name, both in METRICS.items() if name in names}
    if "eigenvalues" in settings and "density" in settings:
        # They share a basis, so the larger one costs nothing more.
        steps = settings["eigenvalues"]["steps"], settings["density"]["steps"]
        settings["eigenvalues"]["steps"] = max(steps)
    return settings


def cost_of(metric: str, settings: Mapping[str, Parameters]) -> float:
    """Return about how many evaluations of the loss a metric takes as long as."""
    p = settings[metric]
    cost: float = 1.0
    match metric:
        case "eigenvalues":
            cost = PRODUCT_COST * p["steps"]
        case "density":
            shared = settings["eigenvalues"]["steps"] if "eigenvalues" in settings else 0
            cost = PRODUCT_COST * max(p["vectors"] * p["steps"] - shared, 0)
        case "trace":
            cost = PRODUCT_COST * p["samples"]
        case "line":
            cost = p["directions"] * p["points"]
        case "plane":
            cost = p["points"] ** 2
        case "average":
            cost = len(p["radii"]) * p["samples"]
        case "worst":
            cost = GRADIENT_COST * len(p["radii"]) * p["steps"] * p["restarts"]
        case "epsilon":
            cost = GRADIENT_COST * len(p["sizes"]) * p["iterations"]
        case "between":
            cost = 2 * p["points"]  # the statistics take an evaluation too
    return cost


@dataclass
class Job:
    """One metric of one checkpoint."""

    metric: str
    parameters: Parameters
    key: Mapping[str, Any]
    cost: float


@dataclass
class Work:
    """One checkpoint of a run and what is to be measured of it."""

    subject: Subject
    file: Path
    step: int
    sha256: str
    jobs: list[Job]
    records: dict[str, Record] = field(default_factory=dict)


def same_network(models: Sequence[nn.Module]) -> bool:
    """Return whether the models have weights of the same shapes."""
    shapes = [[p.shape for p in model.parameters()] for model in models]
    return all(other == shapes[0] for other in shapes)


def plan(
    subjects: Sequence[Subject],
    settings: Mapping[str, Parameters],
    sample: FrozenSample,
    models: Sequence[nn.Module],
) -> list[list[Work]]:
    """Return the work of each run, checkpoint by checkpoint, each metric with the key of all that
    it depends on.

    Raises:
        UsageError: `between` was asked for, and the runs have different networks.
        DataError: a checkpoint is damaged.
    """
    first = digest_of(subjects[0].files[-1])
    everything = []
    along = {name: METRICS[name][0] for name in ALONG_TRAINING if name in settings}
    for number, subject in enumerate(subjects):
        if "between" in settings and not same_network([models[0], models[number]]):
            raise UsageError(
                f"{subjects[0].label} and {subject.label} have different networks, and there is "
                "no line between them: "
                "leave between out of --metrics"
            )
        works = []
        for file in subject.files:
            compared = file == subject.files[-1]
            step, _ = read_checkpoint(file)
            sha256 = digest_of(file)
            wanted = {LEVEL: {}, **settings} if compared else along
            if number == 0:
                wanted.pop("between", None)
            jobs = [
                Job(
                    metric,
                    parameters,
                    {
                        "metric": metric,
                        "parameters": parameters,
                        "checkpoint": sha256,
                        "sample": sample.description,
                        **({"from": first} if metric == "between" else {}),
                    },
                    cost_of(metric, wanted),
                )
                for metric, parameters in wanted.items()
            ]
            works.append(Work(subject, file, step, sha256, jobs))
        everything.append(works)
    return everything


def measure_all(
    works: Sequence[Sequence[Work]],
    models: Sequence[nn.Module],
    task: Task,
    sample: FrozenSample,
    precisions: Sequence[str],
    store: RecordStore,
    ranks: Ranks,
    show: "MeasureDisplay",
    stop_requested: Callable[[], bool],
) -> list[tuple[MeasuredCheckpoint, ...]]:
    """Measure what is not stored yet and return each run's checkpoints, in order; a collective.

    Raises:
        StoppedEarly: `stop_requested` said so on some rank, after a metric.
        UsageError: the model has no second derivatives.
        DivergedError: the loss or its curvature is not finite.
    """
    jobs = [(work, job) for run in works for work in run for job in work.jobs]
    found = [store.get(job.key) for _, job in jobs] if ranks.rank == 0 else []
    there = agreed("".join("1" if record else "0" for record in found), ranks)
    for (work, job), mark in zip(jobs, there, strict=True):
        if mark == "1":
            record = store.get(job.key)
            assert record is not None
            work.records[job.metric] = record
    show.start(
        [job.cost for (_, job), mark in zip(jobs, there, strict=True) if mark == "0"],
        there.count("1"),
    )
    first_weights = [p.detach().clone() for p in models[0].parameters() if p.requires_grad]
    for run, model, precision in zip(works, models, precisions, strict=True):
        for work in run:
            missing = [job for job in work.jobs if job.metric not in work.records]
            if not missing:
                continue
            load_checkpoint_into(model, work.file)
            tested = None
            if LEVEL in [job.metric for job in missing] and task.evaluation_size("test"):
                tested = evaluate(task, model, "test", ranks, precision)
            with FrozenLoss(model, task.loss, sample.batches, ranks) as loss:
                bench = _Bench(loss, task, sample, first_weights, tested)
                for job in missing:
                    if sum_over_ranks(torch.tensor(float(stop_requested())), ranks) > 0:
                        raise StoppedEarly
                    record = _recorded(bench, job, show, work.subject.label)
                    only_first_rank(ranks, lambda key=job.key, done=record: store.put(key, done))  # type: ignore[misc]
                    work.records[job.metric] = record
    return [tuple(_measured(work) for work in run) for run in works]


def _measured(work: Work) -> MeasuredCheckpoint:
    records: Records = {name: record for name, record in work.records.items() if name != "between"}
    return MeasuredCheckpoint(work.step, str(work.file), work.sha256, records)


def compare(
    subjects: Sequence[Subject],
    works: Sequence[Sequence[Work]],
    measured: Sequence[tuple[MeasuredCheckpoint, ...]],
    settings: dict[str, Any],
    sample: FrozenSample,
    metric: str,
) -> Comparison:
    """Return the comparison that the tables and pictures are made of."""
    runs = [
        MeasuredRun(
            label=subject.label,
            directory=str(subject.directory),
            batch_size=subject.config.batch_size,
            seed=subject.config.seed,
            metric=metric,
            checkpoints=checkpoints,
            between=run[-1].records.get("between"),
        )
        for subject, run, checkpoints in zip(subjects, works, measured, strict=True)
    ]
    return Comparison(settings, sample.description, tuple(runs))


def _recorded(bench: "_Bench", job: Job, show: "MeasureDisplay", label: str) -> Record:
    loss = bench.loss
    before = loss.products, loss.gradients, loss.evaluations
    started = time.monotonic()

    def counted() -> tuple[int, int, int]:
        products, gradients, evaluations = before
        return loss.products - products, loss.gradients - gradients, loss.evaluations - evaluations

    show.begin(label, job.metric, job.cost, counted)
    values, curves = bench.measure(job.metric, job.parameters)
    record = Record(values, curves, *counted(), seconds=round(time.monotonic() - started, 3))
    show.finish(label, job.metric, job.cost, record)
    return record


class _Bench:
    """A model on the frozen sample, and what its metrics share."""

    def __init__(
        self,
        loss: FrozenLoss,
        task: Task,
        sample: FrozenSample,
        first_weights: Sequence[Tensor],
        tested: dict[str, float] | None,
    ) -> None:
        self.loss = loss
        self._task = task
        self._sample = sample
        self._first_weights = first_weights
        self._tested = tested
        self._krylov: Krylov | None = None

    def measure(self, metric: str, p: Parameters) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the values and the curves of a metric."""
        loss = self.loss
        match metric:
            case "level":
                value, score = loss.value()
                if self._task.training_metric.name == "perplexity":
                    score = math.exp(value)  # which the mean over batches is not
                train = {"loss": value, self._task.training_metric.name: score}
                return {"train": train, **({"test": self._tested} if self._tested else {})}, {}
            case "eigenvalues":
                found = eigenvalues(loss, count=p["count"], steps=p["steps"], seed=SEED)
                self._krylov = found.krylov
                values = {
                    name: getattr(found, name)
                    for name in (
                        *("largest", "residuals", "converged"),
                        *("smallest", "smallest_residual", "smallest_converged"),
                    )
                }
                return values, {}
            case "density":
                spectrum = density(
                    loss, vectors=p["vectors"], steps=p["steps"], seed=SEED, krylov=self._krylov
                )
                self._krylov = None  # its basis takes as much memory as many models
                return {}, {"nodes": spectrum.nodes.tolist(), "weights": spectrum.weights.tolist()}
            case "trace":
                estimate = trace(loss, samples=p["samples"], seed=SEED)
                error = estimate.standard_error
                return {"mean": estimate.mean, "standard_error": error}, {
                    "samples": estimate.samples
                }
            case "line":
                curves = [
                    line(loss, self._direction(number), points=p["points"], span=p["span"])
                    for number in range(p["directions"])
                ]
                return {}, {
                    "positions": curves[0].positions.tolist(),
                    "losses": [curve.losses.tolist() for curve in curves],
                    "metrics": [curve.metrics.tolist() for curve in curves],
                }
            case "plane":
                surface = plane(
                    loss, self._direction(0), self._direction(1), points=p["points"], span=p["span"]
                )
                return {}, {
                    name: getattr(surface, name).tolist()
                    for name in ("positions", "losses", "metrics")
                }
            case "average":
                pairs = [
                    average_sharpness(loss, r, samples=p["samples"], seed=SEED) for r in p["radii"]
                ]
                means, errors = map(list, zip(*pairs, strict=True))
                return {"radii": p["radii"], "mean": means, "standard_error": errors}, {}
            case "worst":
                rises = [
                    worst_sharpness(loss, r, steps=p["steps"], restarts=p["restarts"], seed=SEED)
                    for r in p["radii"]
                ]
                return {"radii": p["radii"], "sharpness": rises}, {}
            case "epsilon":
                found_in_box = [
                    epsilon_sharpness(loss, size, iterations=p["iterations"]) for size in p["sizes"]
                ]
                return {"sizes": p["sizes"], "sharpness": found_in_box}, {}
            case "between":
                own = [w.detach().clone() for w in loss.parameters]
                path = between(
                    loss,
                    self._first_weights,
                    own,
                    points=p["points"],
                    recompute_statistics=lambda: recompute_batchnorm(
                        loss.model, self._sample.batches, self._task.loss
                    ),
                )
                curve = {
                    name: getattr(path, name).tolist()
                    for name in ("positions", "losses", "metrics")
                }
                return {"barrier": barrier(curve["positions"], curve["losses"])}, curve
        raise ValueError(metric)

    def _direction(self, number: int) -> list[Tensor]:
        return filter_normalised_direction(self.loss.parameters, SEED, number)


class MeasureDisplay:
    """Shows how far the measuring is: a line for each metric, and a live bar with the time left on
    a terminal.

    Args:
        stream: where to; standard output if None.
        silent: show nothing, on ranks other than the first.
    """

    def __init__(self, stream: TextIO | None = None, silent: bool = False) -> None:
        self._console = Console(file=sys.stdout if stream is None else stream, highlight=False)
        self._silent = silent
        self._live: Live | None = None
        self._total = self._done = 0.0
        self._now: tuple[str, float, Callable[[], tuple[int, int, int]]] | None = None
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        if not self._silent and can_redraw(self._console):
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def start(self, costs: Sequence[float], stored: int) -> None:
        """Take the costs of what is to be measured, and how many measurements are stored
        already.
        """
        self._total, self._started = sum(costs), time.monotonic()
        text = f"{len(costs)} measurements to make" if costs else "nothing left to measure"
        self._print(f"{text}{f', {stored} stored already' if stored else ''}")

    def begin(
        self, label: str, metric: str, cost: float, counted: Callable[[], tuple[int, int, int]]
    ) -> None:
        """Take the beginning of a metric; `counted` tells its products, gradients and evaluations
        so far.
        """
        self._now = f"{label}: {metric}", cost, counted

    def finish(self, label: str, metric: str, cost: float, record: Record) -> None:
        """Take a finished metric."""
        self._now = None
        self._done += cost
        amounts = {
            "product": record.products,
            "gradient": record.gradients,
            "evaluation": record.evaluations,
        }
        work = [f"{n:,} {name}{'' if n == 1 else 's'}" for name, n in amounts.items() if n]
        left = self._left()
        self._print(
            ", ".join(
                [f"{label}: {metric}", *work, f"{record.seconds:.1f} s", *([left] if left else [])]
            )
        )

    def _print(self, text: str) -> None:
        if not self._silent:
            self._console.print(Text(text), soft_wrap=True)

    def _fraction(self) -> float:
        done = self._done
        if self._now is not None:
            _, cost, counted = self._now
            products, gradients, evaluations = counted()
            done += min(cost, PRODUCT_COST * products + GRADIENT_COST * gradients + evaluations)
        return done / self._total if self._total else 1.0

    def _left(self) -> str:
        fraction = self._fraction()
        if not 0.02 < fraction < 1:
            return ""
        seconds = (time.monotonic() - self._started) * (1 - fraction) / fraction
        return f"about {duration(seconds)} left"

    def _render(self) -> RenderableType:
        row = Table.grid(expand=True, padding=(0, 1))
        row.add_column(no_wrap=True, overflow="ellipsis", max_width=40)
        row.add_column(ratio=1, min_width=8)
        for _ in range(3):
            row.add_column(no_wrap=True, justify="right")
        name, products = "", ""
        if self._now is not None:
            name, _, counted = self._now
            products = f"{counted()[0]} products" if counted()[0] else ""
        fraction = self._fraction()
        row.add_row(
            Text(name),
            ProgressBar(total=1.0, completed=fraction),
            f"{fraction:.0%}",
            products,
            self._left(),
        )
        return row
