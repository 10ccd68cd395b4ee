"""Which metrics of which checkpoints are measured, with which parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from egtrain.checkpoint import read_checkpoint
from egtrain.errors import UsageError, did_you_mean
from egtrain.sharpness.metric import Parameters, Settings
from egtrain.sharpness.metrics import METRICS, metric_of
from egtrain.sharpness.records import LEVEL, Record
from egtrain.sharpness.subjects import FrozenSample, Subject, digest_of


@dataclass
class Job:
    """One metric of one checkpoint."""

    metric: str
    parameters: Parameters
    key: Mapping[str, Any]
    """Everything that the measurement is a function of."""
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


def settings_of(names: Sequence[str] | None, thorough: bool, runs: int) -> dict[str, Parameters]:
    """Return the parameters of the metrics that were asked for; by default all that the number of
    runs allows.

    Raises:
        UsageError: a metric is unknown, named twice or impossible.
    """
    if names is None:
        names = [name for name in METRICS if runs > 1 or not metric_of(name).from_first_run]
    if not names:
        raise UsageError(f"--metrics names nothing to measure: choose from {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            hint = did_you_mean(name, list(METRICS)) or f"; choose from {', '.join(METRICS)}"
            raise UsageError(f"unknown metric {name!r}{hint}")
        if list(names).count(name) > 1:
            raise UsageError(f"--metrics names {name} twice: name it once")
        if runs < 2 and metric_of(name).from_first_run:
            raise UsageError(
                f"{name} is the line between two runs: name a second run, or leave it out of "
                "--metrics"
            )
    chosen = {name: metric_of(name) for name in METRICS if name in names}
    settings = {
        name: dict(metric.thorough if thorough else metric.default)
        for name, metric in chosen.items()
    }
    return {name: metric.adapted(settings[name], settings) for name, metric in chosen.items()}


def along_training(settings: Settings) -> dict[str, Parameters]:
    """Return what is measured of the checkpoints before the compared one."""
    metrics = {name: metric_of(name) for name in settings}
    return {name: dict(metric.default) for name, metric in metrics.items() if metric.over_steps}


def same_network(models: Sequence[nn.Module]) -> bool:
    """Return whether the models have weights of the same shapes."""
    shapes = [[p.shape for p in model.parameters()] for model in models]
    return all(other == shapes[0] for other in shapes)


def without_paths(settings: dict[str, Parameters]) -> dict[str, Parameters]:
    """Return the settings without the metrics that are measured between two runs."""
    return {name: p for name, p in settings.items() if not metric_of(name).from_first_run}


def plan(
    subjects: Sequence[Subject],
    settings: dict[str, Parameters],
    sample: FrozenSample,
    models: Sequence[nn.Module],
) -> list[list[Work]]:
    """Return the work of each run, checkpoint by checkpoint.

    Raises:
        UsageError: a line between two runs was asked for, and they have different networks.
        DataError: a checkpoint is damaged.
    """
    if without_paths(settings) != settings:
        for subject, model in zip(subjects, models, strict=True):
            if not same_network([models[0], model]):
                raise UsageError(
                    f"{subjects[0].label} and {subject.label} have different networks, and there "
                    "is no line between them: leave between out of --metrics"
                )
    first = digest_of(subjects[0].files[-1])
    return [
        [_work(subject, file, settings, sample, first, number == 0) for file in subject.files]
        for number, subject in enumerate(subjects)
    ]


def _work(
    subject: Subject,
    file: Path,
    settings: dict[str, Parameters],
    sample: FrozenSample,
    first: str,
    of_first_run: bool,
) -> Work:
    step, _ = read_checkpoint(file)
    sha256 = digest_of(file)
    if file != subject.files[-1]:
        wanted = along_training(settings)
    else:
        wanted = {LEVEL: {}, **(without_paths(settings) if of_first_run else settings)}
    jobs = []
    for name, parameters in wanted.items():
        metric = metric_of(name)
        key = {
            "metric": name,
            "parameters": parameters,
            "checkpoint": sha256,
            "sample": sample.description,
            **({"from": first} if metric.from_first_run else {}),
        }
        jobs.append(Job(name, parameters, key, metric.cost(wanted)))
    return Work(subject, file, step, sha256, jobs)
