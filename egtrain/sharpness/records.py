"""What was measured of each run, and the folder that keeps each finished measurement."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from egtrain.checkpoint import write_atomically
from egtrain.tasks import Metric

FORMAT = 1
"""Version of the stored measurements; those of another one are measured again."""
LEVEL = "level"
"""The metric that is always measured first: loss and metric of the task."""


@dataclass(frozen=True)
class Record:
    """One metric of one checkpoint: `values` are numbers and short lists, `curves` are arrays as
    nested lists.
    """

    values: dict[str, Any]
    curves: dict[str, Any] = field(default_factory=dict)
    products: int = 0
    """Hessian-vector products over the frozen sample that it took."""
    gradients: int = 0
    evaluations: int = 0
    seconds: float = 0.0


Records = dict[str, Record]
"""The records of one checkpoint by metric."""


@dataclass(frozen=True)
class MeasuredCheckpoint:
    """One checkpoint with what was measured of it."""

    step: int
    file: str
    sha256: str
    records: Records


@dataclass(frozen=True)
class MeasuredRun:
    """One run of the comparison: its checkpoints in the order of their steps, of which the last one
    is compared.
    """

    label: str
    directory: str
    batch_size: int
    seed: int
    metric: Metric
    """Of the task, on held-out data."""
    training_metric: Metric
    """Of the task, on training data; it may be another one."""
    checkpoints: tuple[MeasuredCheckpoint, ...]
    from_first: Records = field(default_factory=dict)
    """What was measured between the first run and this one."""

    @property
    def records(self) -> Records:
        """Return what was measured of the compared checkpoint."""
        return self.checkpoints[-1].records

    @property
    def level(self) -> dict[str, Any]:
        """Return loss and metric of the compared checkpoint, by split."""
        values: dict[str, Any] = self.records[LEVEL].values
        return values

    @property
    def loss(self) -> float:
        """Return the loss over the frozen sample."""
        return float(self.level["train"]["loss"])

    def all_records(self) -> Iterator[tuple[MeasuredCheckpoint, str, Record]]:
        """Yield every record with its checkpoint and metric."""
        for checkpoint in self.checkpoints:
            for metric, record in checkpoint.records.items():
                yield checkpoint, metric, record
        for metric, record in self.from_first.items():
            yield self.checkpoints[-1], metric, record


class RecordStore:
    """The measurements in a folder, a file each, found by the hash of everything that they are a
    function of.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: Mapping[str, Any]) -> Record | None:
        """Return what was stored under the key; None where there is nothing, or it is damaged."""
        try:
            content = json.loads(self._path(key).read_text(encoding="utf-8"))
            return Record(**content["record"]) if content["key"] == _plain(key) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: Mapping[str, Any], record: Record) -> None:
        """Store a measurement, whole or not at all.

        Raises:
            EgtrainError: it could not be written.
        """
        self._folder.mkdir(exist_ok=True)
        content = {"key": _plain(key), "record": asdict(record)}
        write_atomically(self._path(key), json.dumps(content).encode())

    def _path(self, key: Mapping[str, Any]) -> Path:
        text = json.dumps({"format": FORMAT, **_plain(key)}, sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _plain(key: Mapping[str, Any]) -> dict[str, Any]:
    """Return the key as JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(key))
    return plain
