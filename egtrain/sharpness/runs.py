"""The runs of a comparison and their checkpoints, found from the command line."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from egtrain.checkpoint import CheckpointStore, read_checkpoint
from egtrain.config.files import config_file_of, load_config
from egtrain.config.schema import Config
from egtrain.config.tasks import UserSettings
from egtrain.errors import DataError, UsageError, did_you_mean
from egtrain.sharpness.metrics import LEVEL, metric_of
from egtrain.sharpness.records import Record, Row
from egtrain.tasks import Metric

WHICH = ("last", "best", "all")


@dataclass
class Checkpoint:
    """A checkpoint and its measurements."""

    file: Path
    step: int
    records: dict[str, Record] = field(default_factory=dict)
    """By metric."""

    @cached_property
    def sha256(self) -> str:
        """The hash of the file."""
        with self.file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    def rows(self, metric: str) -> list[Row]:
        """Return the numbers of a metric."""
        return list(metric_of(metric).rows(self.records[metric].values))


@dataclass
class Run:
    """A run; its checkpoints are in the order of their steps, and the last one is compared."""

    label: str
    directory: Path
    config: Config
    checkpoints: list[Checkpoint]
    metrics: tuple[Metric, ...] = ()
    """The task's metrics of held-out data and of training data, known once the run is loaded."""

    @property
    def records(self) -> dict[str, Record]:
        """The measurements of the compared checkpoint."""
        return self.checkpoints[-1].records

    @property
    def loss(self) -> float:
        """The loss over the frozen sample."""
        return float(self.records[LEVEL].values["train"]["loss"])

    @property
    def network(self) -> dict[str, Any]:
        """The settings that, with the data, determine the shapes of the weights."""
        model = self.config.model.model_dump()
        if isinstance(self.config.task, UserSettings):
            model |= {"name": self.config.title, **self.config.task.settings}
        return {name: value for name, value in model.items() if not isinstance(value, float)}

    def measured(self) -> list[tuple[Checkpoint, str]]:
        """Return each checkpoint with each of its measured metrics."""
        return [(c, metric) for c in self.checkpoints for metric in c.records]


@dataclass(frozen=True)
class Comparison:
    """Everything that the tables and pictures show."""

    settings: dict[str, Any]
    """`metrics`, the parameters of each, and the options that change the results."""
    sample: dict[str, Any]
    """The size and the hashes of the frozen sample."""
    runs: Sequence[Run]


def find_runs(paths: Sequence[Path], labels: Sequence[str], which: str) -> list[Run]:
    """Return the runs of a command line, without their models.

    Args:
        paths: run directories, and checkpoint files in them.
        labels: `PATH=TEXT` each; a run without one is labelled by as much of its path as
            distinguishes it from the others.
        which: `last`, `best` or `all` checkpoints of each directory.

    Raises:
        UsageError: a path is not a run or is named twice, or a label belongs to no run, or two
            labels are the same.
        DataError: a checkpoint is missing or damaged.
    """
    if which not in WHICH:
        hint = did_you_mean(which, [*WHICH])
        raise UsageError(f"--checkpoints must be {', '.join(WHICH)}, not {which!r}{hint}")
    resolved = [path.resolve() for path in paths]
    for number, path in enumerate(paths):
        if resolved[number] in resolved[:number]:
            raise UsageError(f"{path} is named twice: name each run or checkpoint once")
    given = given_labels(paths, labels)
    texts = [given.get(p, name) for p, name in zip(paths, _short_names(resolved), strict=True)]
    for text in texts:
        if texts.count(text) > 1:
            raise UsageError(
                f"two runs have the label {text!r}: give them different ones with --label PATH=TEXT"
            )
    return [_run(path, text, which) for path, text in zip(paths, texts, strict=True)]


def given_labels(paths: Sequence[Path], labels: Sequence[str]) -> dict[Path, str]:
    """Return the labels by their paths.

    Raises:
        UsageError: a label has no text, its path is not among `paths`, or its path has two labels.
    """
    given: dict[Path, str] = {}
    for label in labels:
        # A path may contain an equals sign.
        ends = [n for n, sign in enumerate(label) if sign == "=" and Path(label[:n]) in paths]
        if not ends:
            hint = did_you_mean(label.partition("=")[0], [str(path) for path in paths])
            raise UsageError(
                f"--label {label} belongs to no run: write PATH=TEXT with a path from this "
                f"command{hint}"
            )
        path, text = Path(label[: ends[-1]]), label[ends[-1] + 1 :].strip()
        if not text:
            raise UsageError(f"--label {label} has no text: write PATH=TEXT")
        if path in given:
            raise UsageError(f"--label names {path} twice: give it one label")
        given[path] = text
    return given


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return as few last parts of each path as distinguish it from the others."""
    parts = [(p.with_suffix("") if p.suffix == ".pt" else p).parts for p in paths]
    names = []
    for own in parts:
        length = 1
        while length < len(own) and sum(p[-length:] == own[-length:] for p in parts) > 1:
            length += 1
        names.append("/".join(own[-length:]))
    return names


def _run(path: Path, label: str, which: str) -> Run:
    if path.is_file():
        directory = path.resolve().parent.parent
        if not (directory / "config.yaml").is_file():
            raise UsageError(
                f"{path} is a checkpoint without its run: put it back into the folder "
                "checkpoints of a run directory with config.yaml"
            )
        config = load_config(config_file_of(directory))
        return Run(label, directory, config, [Checkpoint(path, read_checkpoint(path)[0])])
    if path.suffix == ".pt" and not path.exists():
        raise DataError(f"there is no checkpoint file {path}")
    config = load_config(config_file_of(path))
    store = CheckpointStore(path / "checkpoints")
    # Loaded to find the newest or best intact one.
    step, _ = store.load("best" if which == "best" else "last")
    steps = [s for s in store.steps() if s < step] if which == "all" else []
    return Run(label, path, config, [Checkpoint(store.file_of(s), s) for s in [*steps, step]])
