"""What was measured, on the disk: a file for each finished metric, and the tables that come out of
them.
"""

import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from egtrain.checkpoint import write_atomically
from egtrain.environment import versions
from egtrain.errors import UsageError
from egtrain.runlog import finite

FORMAT = 1
"""Version of the stored measurements; those of another one are measured again."""
NAME = "sharpness"
LEVEL = "level"
"""Loss and metric of a checkpoint, on the frozen sample and on the test split; measured before
everything else."""
LOSS_TOLERANCE = 0.1
"""Training losses that differ by more, relative to the lowest, are warned of."""
CAVEATS = (
    "Read with care: sharpness follows the learning rate more closely than it follows "
    "generalisation, so compare runs "
    "of one learning rate first.",
    "λ_max, trace, density and ε-sharpness also change when weights are rescaled in a way that "
    "leaves the function as "
    "it is; the adaptive average and worst values do not, nor do the filter-normalised "
    "landscapes where a whole layer, "
    "or a filter before BatchNorm, is rescaled.",
)


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

    @property
    def largest_eigenvalue(self) -> float | None:
        """Return λ_max, if it was measured."""
        record = self.records.get("eigenvalues")
        return None if record is None else float(record.values["largest"][0])

    @property
    def trace(self) -> float | None:
        """Return the trace of the Hessian, if it was measured."""
        record = self.records.get("trace")
        return None if record is None else float(record.values["mean"])


@dataclass(frozen=True)
class MeasuredRun:
    """One run of the comparison: its checkpoints in the order of their steps, of which the last one
    is compared.
    """

    label: str
    directory: str
    batch_size: int
    seed: int
    metric: str
    """Name of the task's metric, for example `accuracy`."""
    checkpoints: tuple[MeasuredCheckpoint, ...]
    between: Record | None = None
    """The straight line from the first run to this one."""

    @property
    def records(self) -> Records:
        """Return what was measured of the compared checkpoint."""
        return self.checkpoints[-1].records

    @property
    def level(self) -> dict[str, Any]:
        """Return loss and metric of the compared checkpoint, by split."""
        return self.records[LEVEL].values


@dataclass(frozen=True)
class Comparison:
    """Everything that one picture shows."""

    settings: dict[str, Any]
    sample: dict[str, Any]
    runs: tuple[MeasuredRun, ...]

    @property
    def warnings(self) -> list[str]:
        """Return what the numbers themselves warn of, a sentence each."""
        found = []
        losses = {run.label: float(run.level["train"]["loss"]) for run in self.runs}
        low, high = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
        if losses[high] > (1 + LOSS_TOLERANCE) * losses[low]:
            found.append(
                f"the training losses differ by more than {LOSS_TOLERANCE:.0%} ({losses[low]:.4g} "
                f"of {low}, "
                f"{losses[high]:.4g} of {high}): sharpness is best compared at equal training loss"
            )
        loose = [
            run.label
            for run in self.runs
            if any(
                "eigenvalues" in checkpoint.records
                and not all(checkpoint.records["eigenvalues"].values["converged"])
                for checkpoint in run.checkpoints
            )
        ]
        if loose:
            more = "" if self.settings.get("thorough") else ": use --thorough"
            found.append(
                f"eigenvalues of {', '.join(loose)} have not converged (their residuals are in "
                f"{NAME}.json){more}"
            )
        return found


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


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return what sharpness.json holds: everything but the curves."""
    return {
        "settings": comparison.settings,
        "sample": comparison.sample,
        "runs": [
            {
                "label": run.label,
                "directory": run.directory,
                "batch_size": run.batch_size,
                "seed": run.seed,
                "metric": run.metric,
                "checkpoints": [
                    {
                        "step": checkpoint.step,
                        "file": checkpoint.file,
                        "sha256": checkpoint.sha256,
                        "metrics": {
                            name: _without_curves(r) for name, r in checkpoint.records.items()
                        },
                    }
                    for checkpoint in run.checkpoints
                ],
                **({} if run.between is None else {"between": _without_curves(run.between)}),
            }
            for run in comparison.runs
        ],
        "warnings": comparison.warnings,
        "caveats": list(CAVEATS),
        "versions": versions(),
    }


def _without_curves(record: Record) -> dict[str, Any]:
    rest = asdict(record)
    del rest["curves"]
    return {**rest.pop("values"), **rest}


def write_results(comparison: Comparison, folder: Path) -> None:
    """Write sharpness.json, sharpness.npz (the curves) and sharpness.csv (a line for each number).

    Raises:
        EgtrainError: a file could not be written.
    """
    text = json.dumps(finite(as_json(comparison)), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / f"{NAME}.json", (text + "\n").encode())
    arrays = io.BytesIO()
    np.savez_compressed(arrays, **dict(_curves(comparison)))  # type: ignore[arg-type]
    write_atomically(folder / f"{NAME}.npz", arrays.getvalue())
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["run", "step", "metric", "quantity", "at", "value", "error"])
    rows.writerows(_rows(comparison))
    write_atomically(folder / f"{NAME}.csv", table.getvalue().encode())


def _curves(comparison: Comparison) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the arrays by name, `run/step/metric/curve`."""
    for run, checkpoint, metric, record in _all_records(comparison):
        for name, curve in record.curves.items():
            yield (
                f"{run.label}/{checkpoint.step}/{metric}/{name}",
                np.asarray(curve, dtype=np.float64),
            )


def _all_records(
    comparison: Comparison,
) -> Iterator[tuple[MeasuredRun, MeasuredCheckpoint, str, Record]]:
    for run in comparison.runs:
        for checkpoint in run.checkpoints:
            for metric, record in checkpoint.records.items():
                yield run, checkpoint, metric, record
        if run.between is not None:
            yield run, run.checkpoints[-1], "between", run.between


def _rows(comparison: Comparison) -> Iterator[list[object]]:
    for run, checkpoint, metric, record in _all_records(comparison):
        for quantity, at, value, error in quantities(metric, record):
            yield [run.label, checkpoint.step, metric, quantity, at, value, error]


def quantities(metric: str, record: Record) -> Iterator[tuple[str, object, float, float | str]]:
    """Yield the numbers of a record: the quantity, where it was taken (number, radius or size),
    value and error.
    """
    values = record.values
    match metric:
        case "level":
            for split, found in values.items():
                for name, value in found.items():
                    yield f"{split}_{name}", "", value, ""
        case "eigenvalues":
            for number, (value, residual) in enumerate(
                zip(values["largest"], values["residuals"], strict=False), 1
            ):
                yield "largest", number, value, residual
            yield "smallest", "", values["smallest"], ""
        case "trace":
            yield "trace", "", values["mean"], values["standard_error"]
        case "epsilon":
            for size, value in zip(values["sizes"], values["sharpness"], strict=True):
                yield "sharpness", size, value, ""
        case "average":
            for row in zip(values["radii"], values["mean"], values["standard_error"], strict=True):
                yield "sharpness", *row
        case "worst":
            for radius, value in zip(values["radii"], values["sharpness"], strict=True):
                yield "sharpness", radius, value, ""
        case "between":
            yield "barrier", "", values["barrier"], ""


def write_tensorboard(
    folder: Path, scalars: Mapping[int, Mapping[str, float]], images: Mapping[str, bytes]
) -> None:
    """Write scalars by step and tag, and PNG images by tag at the last step, as the one event file
    of a folder.

    The folder is a run of its own for TensorBoard, so that the files of the training stay as they
    are.

    Raises:
        EgtrainError: it could not be written.
    """
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    records = RecordWriter(content)
    now = time.time()
    records.write(event_pb2.Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    for step, values in sorted(scalars.items()):
        summary = summary_pb2.Summary()
        for tag, value in values.items():
            summary.value.add(tag=tag, simple_value=value)
        records.write(
            event_pb2.Event(wall_time=now, step=step, summary=summary).SerializeToString()
        )
    for tag, png in images.items():
        # A PNG's width and height stand at bytes 16 to 24.
        width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
        image = summary_pb2.Summary.Image(
            height=height, width=width, colorspace=4, encoded_image_string=png
        )
        summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, image=image)])
        records.write(
            event_pb2.Event(wall_time=now, step=max(scalars), summary=summary).SerializeToString()
        )
    write_atomically(folder / f"events.out.tfevents.0000000000.{NAME}", content.getvalue())


def scalars_of(runs: Iterable[MeasuredRun]) -> dict[int, dict[str, float]]:
    """Return TensorBoard's scalars of one run directory, by step and tag."""
    found: dict[int, dict[str, float]] = {}
    for run in runs:
        for checkpoint in run.checkpoints:
            tags = found.setdefault(checkpoint.step, {})
            for metric, record in checkpoint.records.items():
                for quantity, at, value, _ in quantities(metric, record):
                    if metric == LEVEL and not quantity.startswith("train_"):
                        continue
                    tags[f"{NAME}/{_tag(metric, quantity, at)}"] = value
    return found


def _tag(metric: str, quantity: str, at: object) -> str:
    match metric:
        case "level" | "trace":
            return quantity
        case "eigenvalues":
            return (
                "lambda_min"
                if quantity == "smallest"
                else "lambda_max"
                if at == 1
                else f"lambda_{at}"
            )
    return f"{metric}_{at}"


def barrier(positions: Sequence[float], losses: Sequence[float]) -> float:
    """Return how far the loss between two ends, at positions 0 and 1, rises above the straight line
    between them.
    """
    at = dict(zip(positions, losses, strict=True))
    start, end = (at[min(at, key=lambda p: abs(p - goal))] for goal in (0.0, 1.0))
    inside = [loss - ((1 - p) * start + p * end) for p, loss in at.items() if 0 <= p <= 1]
    return max(inside, default=math.nan)
