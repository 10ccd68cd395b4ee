"""The measuring; each finished metric is stored before the next begins."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from egtrain.evaluate import evaluate
from egtrain.ranks.distributed import agreed, only_first_rank
from egtrain.ranks.signals import StoppedEarly
from egtrain.sharpness.display import MeasureDisplay
from egtrain.sharpness.frozen_loss import FrozenLoss
from egtrain.sharpness.metric import ModelAtCheckpoint
from egtrain.sharpness.metrics import metric_of
from egtrain.sharpness.plan import Job, Work
from egtrain.sharpness.records import LEVEL, MeasuredCheckpoint, MeasuredRun, Record, RecordStore
from egtrain.sharpness.subjects import FrozenSample, load_checkpoint_into
from egtrain.tasks import Task
from egtrain.workers import Ranks, sum_over_ranks


def measure_all(
    works: Sequence[Sequence[Work]],
    models: Sequence[nn.Module],
    task: Task,
    sample: FrozenSample,
    precisions: Sequence[str],
    store: RecordStore,
    ranks: Ranks,
    show: MeasureDisplay,
    stop_requested: Callable[[], bool],
) -> tuple[MeasuredRun, ...]:
    """Measure what is not stored yet and return the measured runs; a collective.

    Raises:
        StoppedEarly: `stop_requested` said so on some rank, after a metric.
        UsageError: the model has no second derivatives.
        DivergedError: the loss or its curvature is not finite.
    """
    missing = take_stored(works, store, ranks)
    stored = sum(len(work.records) for run in works for work in run)
    show.start([job.cost for _, job in missing], stored)
    first_weights = [p.detach().clone() for p in models[0].parameters() if p.requires_grad]
    for run, model, precision in zip(works, models, precisions, strict=True):
        for work in run:
            jobs = [job for other, job in missing if other is work]
            if not jobs:
                continue
            load_checkpoint_into(model, work.file)
            test = None
            if LEVEL in [job.metric for job in jobs] and task.evaluation_size("test"):
                test = evaluate(task, model, "test", ranks, precision)
            with FrozenLoss(model, task.loss, sample.batches, ranks) as loss:
                at = ModelAtCheckpoint(loss, task, sample.batches, first_weights, test)
                for job in jobs:
                    if sum_over_ranks(torch.tensor(float(stop_requested())), ranks) > 0:
                        raise StoppedEarly
                    record = measure(at, job, show, work.subject.label)
                    only_first_rank(ranks, lambda key=job.key, done=record: store.put(key, done))  # type: ignore[misc]
                    work.records[job.metric] = record
    return tuple(measured_run(run, task) for run in works)


def take_stored(
    works: Sequence[Sequence[Work]], store: RecordStore, ranks: Ranks
) -> list[tuple[Work, Job]]:
    """Give each work the records that are stored, and return what is missing; a collective."""
    jobs = [(work, job) for run in works for work in run for job in work.jobs]
    found = [store.get(job.key) for _, job in jobs] if ranks.rank == 0 else []
    there = agreed("".join("1" if record else "0" for record in found), ranks)
    missing = []
    for (work, job), mark in zip(jobs, there, strict=True):
        if mark == "0":
            missing.append((work, job))
            continue
        record = store.get(job.key)
        assert record is not None
        work.records[job.metric] = record
    return missing


def measure(model: ModelAtCheckpoint, job: Job, show: MeasureDisplay, label: str) -> Record:
    """Return one measurement with what it took."""
    loss = model.loss
    before = loss.products, loss.gradients, loss.evaluations
    started = time.monotonic()

    def counted() -> tuple[int, int, int]:
        products, gradients, evaluations = before
        return loss.products - products, loss.gradients - gradients, loss.evaluations - evaluations

    show.begin(label, job.metric, job.cost, counted)
    values, curves = metric_of(job.metric).measure(model, job.parameters)
    record = Record(values, curves, *counted(), seconds=round(time.monotonic() - started, 3))
    show.finish(label, job.metric, job.cost, record)
    return record


def measured_run(works: Sequence[Work], task: Task) -> MeasuredRun:
    """Return what was measured of the checkpoints of a run."""
    subject = works[0].subject
    return MeasuredRun(
        label=subject.label,
        directory=str(subject.directory),
        batch_size=subject.config.batch_size,
        seed=subject.config.seed,
        metric=task.metric,
        training_metric=task.training_metric,
        checkpoints=tuple(
            MeasuredCheckpoint(work.step, str(work.file), work.sha256, records_of(work, False))
            for work in works
        ),
        from_first=records_of(works[-1], True),
    )


def records_of(work: Work, from_first_run: bool) -> dict[str, Record]:
    """Return the records that were, or were not, taken between the first run and this one."""
    return {
        name: record
        for name, record in work.records.items()
        if metric_of(name).from_first_run == from_first_run
    }
