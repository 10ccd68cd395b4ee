"""The plan of the measurements, and the measuring; each is stored before the next begins."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from egtrain.checkpoint import read_checkpoint
from egtrain.errors import UsageError
from egtrain.evaluate import evaluate
from egtrain.formatting import counted
from egtrain.models.loading import load_weights
from egtrain.progress import Progress
from egtrain.ranks.distributed import agreed, only_first_rank
from egtrain.ranks.signals import StoppedEarly
from egtrain.saved_run import SavedRun
from egtrain.sharpness.frozen_loss import FrozenLoss
from egtrain.sharpness.metric import GRADIENT, PRODUCT, ModelAtCheckpoint, Parameters, Settings
from egtrain.sharpness.metrics import LEVEL, METRICS, metric_of, require_known
from egtrain.sharpness.recording import measured
from egtrain.sharpness.records import Record, RecordStore
from egtrain.sharpness.runs import Checkpoint, Run
from egtrain.sharpness.sample import FrozenSample
from egtrain.workers import Ranks, sum_over_ranks


@dataclass
class Job:
    """One metric of one checkpoint."""

    metric: str
    parameters: Parameters
    run: Run
    checkpoint: Checkpoint
    key: dict[str, Any]
    """Everything that the measurement depends on."""
    cost: float
    record: Record | None = None


def settings_of(
    names: Sequence[str] | None, thorough: bool, runs: Sequence[Run]
) -> dict[str, Parameters]:
    """Return the parameters of the metrics by name; by default, of all that the runs allow.

    Raises:
        UsageError: a metric is unknown, named twice or impossible.
    """
    different = next((run for run in runs if run.network != runs[0].network), None)
    lines = len(runs) > 1 and different is None
    if names is None:
        names = [name for name in METRICS if lines or not metric_of(name).from_first_run]
    if not names:
        raise UsageError(f"--metrics names nothing to measure: choose from {', '.join(METRICS)}")
    require_known(names)
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--metrics names {name} twice: name it once")
        if metric_of(name).from_first_run and not lines:
            if different is None:
                raise UsageError(
                    f"{name} is the line between two runs: name a second run, or leave it out of "
                    "--metrics"
                )
            raise UsageError(
                f"{runs[0].label} and {different.label} have different networks, and there is no "
                f"line between them: leave {name} out of --metrics"
            )
    chosen = {name: metric_of(name) for name in METRICS if name in names}
    settings = {name: m.thorough if thorough else m.default for name, m in chosen.items()}
    return {name: metric.adapted(settings[name], settings) for name, metric in chosen.items()}


def along_training(settings: Settings) -> dict[str, Parameters]:
    """Return the metrics of the checkpoints before the compared one."""
    return {name: metric_of(name).default for name in settings if metric_of(name).over_steps}


def jobs_of(runs: Sequence[Run], settings: Settings, sample: FrozenSample) -> list[Job]:
    """Return all measurements, run by run and checkpoint by checkpoint."""
    jobs = []
    for run in runs:
        for checkpoint in run.checkpoints:
            wanted = along_training(settings)
            if checkpoint is run.checkpoints[-1]:
                wanted = {LEVEL: {}, **settings}
            for name, parameters in wanted.items():
                metric = metric_of(name)
                key: dict[str, Any] = {"metric": name, "parameters": parameters}
                key |= {"checkpoint": checkpoint.sha256, "sample": sample.description}
                if metric.from_first_run:
                    if run is runs[0]:
                        continue
                    key["from"] = runs[0].checkpoints[-1].sha256
                cost = metric.cost(parameters, wanted)
                jobs.append(Job(name, parameters, run, checkpoint, key, cost))
    return jobs


def measure_all(
    jobs: Sequence[Job],
    runs: Sequence[Run],
    saved: Sequence[SavedRun],
    batches: Sequence[tuple[Any, int]],
    store: RecordStore,
    ranks: Ranks,
    progress: Progress,
    stop_requested: Callable[[], bool],
) -> None:
    """Measure what is not stored yet, and give the checkpoints their records; a collective.

    Raises:
        StoppedEarly: `stop_requested` was true on some rank, after a metric.
        UsageError: the model has no second derivatives.
        DivergedError: the loss or its curvature is not finite.
    """
    found = [store.get(job.key) for job in jobs] if ranks.rank == 0 else []
    contents = json.loads(agreed(json.dumps([r and asdict(r) for r in found]), ranks))
    for job, content in zip(jobs, contents, strict=True):
        job.record = Record(**content) if content else None
    missing = [job for job in jobs if job.record is None]
    to_make = f"{counted(len(missing), 'measurement')} to make"
    stored = len(jobs) - len(missing)
    progress.message(
        (to_make if missing else "nothing left to measure")
        + (f", {stored} stored already" if stored else "")
    )
    task, done = saved[0].task, 0.0
    first_weights = [p.detach().clone() for p in saved[0].model.parameters() if p.requires_grad]
    with progress.bar("measuring", sum(job.cost for job in missing)) as bar:
        bar.update(0.0)
        models = [(c, of_run) for r, of_run in zip(runs, saved, strict=True) for c in r.checkpoints]
        for checkpoint, of_run in models:
            wanted = [job for job in missing if job.checkpoint is checkpoint]
            if not wanted:
                continue
            model, test = of_run.model, None
            load_weights(model, read_checkpoint(checkpoint.file)[1]["model"])
            if wanted[0].metric == LEVEL and task.evaluation_size("test"):
                test = evaluate(task, model, "test", ranks, of_run.config.precision)
            with FrozenLoss(model, task.loss, batches, ranks) as loss:
                at = ModelAtCheckpoint(loss, task, batches, first_weights, test)
                for job in wanted:
                    if sum_over_ranks(torch.tensor(float(stop_requested())), ranks) > 0:
                        raise StoppedEarly
                    bar.watch(partial(_so_far, job, loss, done))
                    job.record = measure(at, job)
                    only_first_rank(ranks, partial(store.put, job.key, job.record))
                    progress.message(_summary(job, job.record))
                    done += job.cost
                    bar.update(done)
    for job in jobs:
        assert job.record is not None
        job.checkpoint.records[job.metric] = job.record


def measure(model: ModelAtCheckpoint, job: Job) -> Record:
    """Make one measurement."""
    return measured(model, job.metric, job.parameters)


def _so_far(job: Job, loss: FrozenLoss, done: float) -> tuple[float, str]:
    """Return how much of all jobs is done while one runs, and the text beside the bar."""
    spent = PRODUCT * loss.products + GRADIENT * loss.gradients + loss.evaluations
    products = f", {counted(loss.products, 'product')}" if loss.products else ""
    return done + min(job.cost, spent), f"{job.run.label}: {job.metric}{products}"


def _summary(job: Job, record: Record) -> str:
    amounts = {"product": record.products, "gradient": record.gradients}
    amounts["evaluation"] = record.evaluations
    work = [counted(amount, unit) for unit, amount in amounts.items() if amount]
    return ", ".join([f"{job.run.label}: {job.metric}", *work, f"{record.seconds:.1f} s"])
