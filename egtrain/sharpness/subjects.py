"""The runs of a comparison, read back, and the frozen sample on which all of them are measured."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from egtrain.build import TASKS
from egtrain.checkpoint import CheckpointStore, read_checkpoint
from egtrain.config.files import config_file_of, load_config
from egtrain.config.schema import Config
from egtrain.errors import DataError, UsageError, did_you_mean
from egtrain.models.loading import load_weights
from egtrain.optim.randomness import generator_for
from egtrain.saved_run import load_run
from egtrain.tasks import Task

SAMPLE_SEED = 0
"""Fixed: runs of all seeds are measured on the same samples."""
WHICH = ("last", "best", "all")


@dataclass(frozen=True)
class Subject:
    """A run that was asked for; of its checkpoint files, in the order of their steps, the last one
    is compared.
    """

    label: str
    directory: Path
    files: tuple[Path, ...]
    config: Config


@dataclass(frozen=True)
class FrozenSample:
    """Training samples without augmentation, the same for all runs of a comparison."""

    batches: list[tuple[Any, int]]
    description: dict[str, Any]
    """Its size and the SHA-256 of the indices and of the data."""


def find_subjects(paths: Sequence[Path], labels: Sequence[str], which: str) -> list[Subject]:
    """Return the runs of a command line, from directories or checkpoint files, without reading any
    weights.

    Args:
        paths: run directories, and checkpoint files inside of them.
        labels: `PATH=TEXT` each; a run without one is labelled by as much of its path as tells it
            from the others.
        which: `last`, `best` or `all` checkpoints of each directory.

    Raises:
        UsageError: a path is no run or is named twice, or a label is of no run, or two are the
            same.
        DataError: a checkpoint is missing.
    """
    if which not in WHICH:
        raise UsageError(
            f"--checkpoints must be {', '.join(WHICH)}, not "
            f"{which!r}{did_you_mean(which, [*WHICH])}"
        )
    resolved: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in resolved:
            raise UsageError(f"{path} is named twice: name each run or checkpoint once")
        resolved[path.resolve()] = path
    given = _given_labels(paths, labels)
    own = _short_names(paths)
    texts = [given.get(path, name) for path, name in zip(paths, own, strict=True)]
    for text in texts:
        if texts.count(text) > 1:
            raise UsageError(
                f"two runs have the label {text!r}: give each its own with --label PATH=TEXT"
            )
    return [_subject(path, text, which) for path, text in zip(paths, texts, strict=True)]


def _given_labels(paths: Sequence[Path], labels: Sequence[str]) -> dict[Path, str]:
    given: dict[Path, str] = {}
    for label in labels:
        # A path may hold an equals sign itself.
        ends = [
            place
            for place, character in enumerate(label)
            if character == "=" and Path(label[:place]) in paths
        ]
        if not ends:
            name = label.partition("=")[0]
            hint = did_you_mean(name, [str(path) for path in paths])
            raise UsageError(
                f"--label {label} is of no run here: write PATH=TEXT with a path as it is "
                f"named{hint}"
            )
        path, text = Path(label[: ends[-1]]), label[ends[-1] + 1 :].strip()
        if not text:
            raise UsageError(f"--label {label} has no text: write PATH=TEXT")
        if path in given:
            raise UsageError(f"--label names {path} twice: give it one label")
        given[path] = text
    return given


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return the fewest last parts of each path that tell it from the others."""
    parts = [
        path.resolve().with_suffix("").parts if path.suffix == ".pt" else path.resolve().parts
        for path in paths
    ]
    names = []
    for own in parts:
        length = next(
            n
            for n in range(1, len(own) + 1)
            if sum(p[-n:] == own[-n:] for p in parts) == 1 or n == len(own)
        )
        names.append("/".join(own[-length:]))
    return names


def _subject(path: Path, label: str, which: str) -> Subject:
    if path.is_file():
        directory = path.resolve().parent.parent
        if not (directory / "config.yaml").is_file():
            raise UsageError(
                f"{path} is a checkpoint without its run: leave it in the checkpoints folder of "
                "the run's directory, "
                "which holds config.yaml"
            )
        return Subject(label, directory, (path,), load_config(config_file_of(directory)))
    if path.suffix == ".pt" and not path.exists():
        raise DataError(f"there is no checkpoint file {path}")
    config = load_config(config_file_of(path))
    store = CheckpointStore(
        path / "checkpoints", higher_is_better=TASKS[config.task.name].metric.higher_is_better
    )
    # Loaded to know the newest or best one that is intact.
    step, _ = store.load("best" if which == "best" else "last")
    steps = [s for s in store.steps() if s < step] if which == "all" else []
    return Subject(label, path, tuple(store.file_of(s) for s in [*steps, step]), config)


def load_subjects(
    subjects: Sequence[Subject], samples: int, data_dir: Path | None, offline: bool, device: str
) -> tuple[list[nn.Module], Task, FrozenSample, list[str]]:
    """Return each run's model at its compared checkpoint, one task and frozen sample for all, and
    their precisions.

    Raises:
        UsageError: the runs cannot be compared, or there are fewer samples than asked for.
        DataError: a checkpoint or the data are missing or damaged.
    """
    models: list[nn.Module] = []
    precisions: list[str] = []
    first: tuple[Task, FrozenSample, Mapping[str, Any]] | None = None
    for subject in subjects:
        require_comparable(
            (subjects[0].label, _asked_for(subjects[0].config)),
            (subject.label, _asked_for(subject.config)),
        )
    for subject in subjects:
        run = load_run(
            subject.directory,
            checkpoint=str(subject.files[-1]),
            data_dir=data_dir,
            offline=offline,
            device=device,
        )
        sample = frozen_sample(run.task, samples, subject.label)
        properties = {
            "training data": sample.description["data_sha256"],
            "metrics": run.task.metric.name,
        }
        if first is None:
            first = run.task, sample, properties
        require_comparable((subjects[0].label, first[2]), (subject.label, properties))
        models.append(run.model)
        precisions.append(run.config.precision)
    assert first is not None
    return models, first[0], first[1], precisions


def require_comparable(
    first: tuple[str, Mapping[str, Any]], other: tuple[str, Mapping[str, Any]]
) -> None:
    """Refuse two runs, each (label, properties), that differ in a property by which numbers cannot
    be compared.

    Raises:
        UsageError: they differ; it names the property and both values.
    """
    for name, value in first[1].items():
        if other[1].get(name) != value:
            raise UsageError(
                f"{first[0]} and {other[0]} cannot be compared: their {name} differ "
                f"({_shown(value)} and "
                f"{_shown(other[1].get(name))}); plot them apart, with an --output of their own"
            )


def _shown(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and " " not in text else text


def _asked_for(config: Config) -> dict[str, Any]:
    """Return what can be told from the configurations alone, before data are read."""
    data = config.data
    return {
        "tasks": config.task.name,
        "data": data.name,
        "training samples": data.train_samples or "all",
        "validation samples": data.validation,
        "label smoothing": getattr(config.task, "label_smoothing", 0.0),
    }


def describe_network(configs: Sequence[Config]) -> str:
    """Return the network that runs have in common, and its data, such as `resnet (depth 20, width
    16) on cifar10`.
    """
    names = set()
    for config in configs:
        sizes = [f"{k} {v}" for k, v in config.model.model_dump().items() if isinstance(v, int)]
        names.add(f"{config.model.name} ({', '.join(sizes)})")
    network = names.pop() if len(names) == 1 else "several networks"
    kind, colon, file = configs[0].data.name.partition(":")
    return f"{network} on {kind}{colon}{Path(file).name}"


def frozen_sample(task: Task, samples: int, label: str) -> FrozenSample:
    """Return so many training samples, drawn by a fixed seed.

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
        "data_sha256": _sha256(t for batch, _ in batches for t in _tensors(batch)),
    }
    return FrozenSample(batches, description)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for key in sorted(batch):
            yield from _tensors(batch[key])
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from _tensors(part)


def _sha256(tensors: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def digest_of(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def load_checkpoint_into(model: nn.Module, file: Path) -> None:
    """Give a model the weights and statistics of a checkpoint."""
    load_weights(model, read_checkpoint(file)[1]["model"])
