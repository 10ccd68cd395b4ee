"""The models of a comparison, loaded, and the frozen sample on which all are measured."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from egtrain.config.schema import Config
from egtrain.errors import UsageError
from egtrain.nested import tensors_in
from egtrain.optim.randomness import generator_for
from egtrain.saved_run import SavedRun, load_run
from egtrain.sharpness.runs import Run
from egtrain.task_file import TaskFile
from egtrain.tasks import Task

SAMPLE_SEED = 0
"""Fixed: runs of all seeds are measured on the same samples."""


@dataclass(frozen=True)
class FrozenSample:
    """Training samples without augmentation, the same for all runs of a comparison."""

    batches: list[tuple[Any, int]]
    description: dict[str, Any]
    """Its size, and the SHA-256 of the indices and of the data."""


def load(
    runs: Sequence[Run],
    samples: int,
    data_dir: Path | None,
    offline: bool,
    device: str,
    task: TaskFile | None = None,
    allow_changes: bool = False,
) -> tuple[list[SavedRun], FrozenSample]:
    """Return each run at its compared checkpoint, and one frozen sample for all.

    The runs are told the metrics of their task. `task` and `allow_changes` are as for `load_run`.

    Raises:
        UsageError: the runs cannot be compared, or there are fewer samples than asked for.
        DataError: a checkpoint or the data are missing or damaged.
    """
    require_comparable(runs, [comparable_settings(run.config) for run in runs])
    saved = [
        load_run(
            run.directory,
            checkpoint=str(run.checkpoints[-1].file),
            data_dir=data_dir,
            offline=offline,
            device=device,
            task=task,
            allow_changes=allow_changes,
        )
        for run in runs
    ]
    require_comparable(runs, [{"training data": f"{run.data.digest[:12]}…"} for run in saved])
    for run in runs:
        run.metrics = (saved[0].task.metric, saved[0].task.training_metric)
    return saved, frozen_sample(saved[0].task, samples, runs[0].label)


def comparable_settings(config: Config) -> dict[str, object]:
    """Return the settings that compared runs must have in common."""
    return {
        "tasks": config.task.name,
        "task files": getattr(config.task, "sha256", None),
        "data": config.data.name,
        "training samples": config.data.train_samples or "all",
        "validation samples": config.data.validation,
        "window lengths": getattr(config.task, "bptt", None),
        "label smoothing": getattr(config.task, "label_smoothing", None),
    }


def require_comparable(runs: Sequence[Run], properties: Sequence[Mapping[str, object]]) -> None:
    """Refuse runs with different properties.

    Raises:
        UsageError: two runs differ; the message names the property and both values.
    """
    for run, found in zip(runs, properties, strict=True):
        for name, value in properties[0].items():
            if found[name] != value:
                raise UsageError(
                    f"{runs[0].label} and {run.label} cannot be compared: their {name} differ "
                    f"({value} and {found[name]}); plot them separately, each into its own --output"
                )


def frozen_sample(task: Task, samples: int, label: str) -> FrozenSample:
    """Return `samples` training samples, drawn with a fixed seed.

    Raises:
        UsageError: there are fewer.
    """
    if samples > task.samples:
        raise UsageError(
            f"--samples {samples} is more than the {task.samples} training samples of {label}: "
            "lower it"
        )
    order = torch.randperm(task.samples, generator=generator_for(SAMPLE_SEED, "sharpness"))
    indices = order[:samples].sort().values
    batches = task.frozen_batches(indices)
    description = {
        "size": samples,
        "indices_sha256": _sha256([indices]),
        "data_sha256": _sha256(tensors_in([batch for batch, _ in batches])),
    }
    return FrozenSample(batches, description)


def _sha256(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
