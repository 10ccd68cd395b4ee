"""The finished measurements, and the folder that stores them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from egtrain.disk import write_atomically

FORMAT = 1
"""Version of the stored measurements; those of another version are measured again."""


@dataclass(frozen=True)
class Record:
    """One metric of one checkpoint, and the work that it took."""

    values: dict[str, Any]
    """Numbers and short lists."""
    curves: dict[str, Any] = field(default_factory=dict)
    """Arrays as nested lists."""
    products: int = 0
    """Hessian-vector products over the frozen sample."""
    gradients: int = 0
    evaluations: int = 0
    seconds: float = 0.0


class Row(NamedTuple):
    """One number of a record, for the CSV file, TensorBoard, the printed table and the panels."""

    quantity: str
    value: float
    error: float | None = None
    at: float | None = None
    """The rank, radius or size that it belongs to."""
    tag: str = ""
    """Its name in TensorBoard; empty if it is not shown there."""
    title: str = ""
    """Its name in the printed table; empty if it is not shown there."""
    text: str = ""
    """Printed instead of the value with its error."""


class RecordStore:
    """The measurements in a folder, one file each, named by a hash of all that they depend on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: Mapping[str, Any]) -> Record | None:
        """Return the record stored under the key; None if there is none or it is damaged."""
        try:
            return Record(**json.loads(self._path(key).read_text(encoding="utf-8"))["record"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: Mapping[str, Any], record: Record) -> None:
        """Store a measurement atomically.

        Raises:
            EgtrainError: it could not be written.
        """
        self._folder.mkdir(exist_ok=True)
        content = {"key": key, "record": asdict(record)}
        write_atomically(self._path(key), json.dumps(content).encode())

    def _path(self, key: Mapping[str, Any]) -> Path:
        text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
