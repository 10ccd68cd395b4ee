"""The results of a comparison as files: sharpness.json, .csv and .npz, and TensorBoard's."""

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from egtrain.disk import write_atomically
from egtrain.formatting import number, percent
from egtrain.logs.environment import versions
from egtrain.logs.events import Events
from egtrain.logs.runlog import finite
from egtrain.sharpness.metrics import metric_of
from egtrain.sharpness.runs import Comparison, Run

NAME = "sharpness"
"""Of the files, without their endings."""
LOSS_TOLERANCE = 0.1
"""Warn if the training losses differ by more than this, relative to the lowest."""
CAVEATS = (
    "Read with care: sharpness follows the learning rate more closely than it follows "
    "generalisation, so compare runs of one learning rate first.",
    "λ_max, trace, density and ε-sharpness also change when weights are rescaled without changing "
    "the function; the adaptive average and worst values do not, nor do the filter-normalised "
    "landscapes when a whole layer, or a filter before BatchNorm, is rescaled.",
)


def warnings_of(comparison: Comparison) -> list[str]:
    """Return the warnings about the numbers, one sentence each."""
    runs, warnings = comparison.runs, []
    low, high = min(runs, key=lambda run: run.loss), max(runs, key=lambda run: run.loss)
    if high.loss > (1 + LOSS_TOLERANCE) * low.loss:
        warnings.append(
            f"the training losses differ by more than {percent(LOSS_TOLERANCE, 0)} "
            f"({number(low.loss)} of {low.label}, {number(high.loss)} of {high.label}): "
            "sharpness is best compared at equal training loss"
        )
    loose: dict[str, dict[str, None]] = {}
    for run in runs:
        for checkpoint, name in run.measured():
            if not all(checkpoint.records[name].values.get("converged", [])):
                loose.setdefault(name, {})[run.label] = None
    more = "" if comparison.settings.get("thorough") else ": use --thorough"
    for name, labels in loose.items():
        warnings.append(
            f"{name} of {', '.join(labels)} have not converged (their residuals are in "
            f"{NAME}.json){more}"
        )
    return warnings


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return what sharpness.json holds: everything but the curves."""
    results: dict[str, Any] = finite(
        {
            "settings": comparison.settings,
            "sample": comparison.sample,
            "runs": [_run_as_json(run) for run in comparison.runs],
            "warnings": warnings_of(comparison),
            "caveats": CAVEATS,
            "versions": versions(),
        }
    )
    return results


def _run_as_json(run: Run) -> dict[str, Any]:
    result: dict[str, Any] = {
        "label": run.label,
        "directory": str(run.directory),
        "batch_size": run.config.batch_size,
        "seed": run.config.seed,
        "metric": run.metrics[0].name,
        "checkpoints": [],
    }
    for c in run.checkpoints:
        metrics: dict[str, Any] = {}
        for name, record in c.records.items():
            rest = asdict(record)
            del rest["curves"]
            # A measurement between two runs does not belong to a checkpoint alone.
            place = result if metric_of(name).from_first_run else metrics
            place[name] = {**rest.pop("values"), **rest}
        of_checkpoint = {"step": c.step, "file": str(c.file), "sha256": c.sha256}
        result["checkpoints"].append({**of_checkpoint, "metrics": metrics})
    return result


def write_results(comparison: Comparison, folder: Path) -> None:
    """Write sharpness.json, sharpness.npz (the curves) and sharpness.csv (a line for each number).

    Raises:
        EgtrainError: a file could not be written.
    """
    text = json.dumps(as_json(comparison), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / f"{NAME}.json", (text + "\n").encode())
    curves: dict[str, Any] = {}
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(["run", "step", "metric", "quantity", "at", "value", "error"])
    for run in comparison.runs:
        for checkpoint, metric in run.measured():
            for name, curve in checkpoint.records[metric].curves.items():
                curves[f"{run.label}/{checkpoint.step}/{metric}/{name}"] = np.asarray(curve, float)
            for row in checkpoint.rows(metric):
                place = [run.label, checkpoint.step, metric, row.quantity, row.at]
                lines.writerow([*place, row.value, row.error])
    arrays = io.BytesIO()
    np.savez_compressed(arrays, **curves)
    write_atomically(folder / f"{NAME}.npz", arrays.getvalue())
    write_atomically(folder / f"{NAME}.csv", table.getvalue().encode())


def write_tensorboard(runs: Sequence[Run], images: Mapping[str, bytes]) -> None:
    """Write numbers, and PNG images by name, into a folder of each run that logs to TensorBoard.

    The files of the training stay as they are. A folder that cannot be written gives a warning.
    """
    scalars: dict[Path, dict[int, dict[str, float]]] = {}
    for run in runs:
        if run.config.log.tensorboard:
            of_run = scalars.setdefault(run.directory / NAME, {})
            for checkpoint, metric in run.measured():
                for row in checkpoint.rows(metric):
                    if row.tag:
                        values = of_run.setdefault(checkpoint.step, {})
                        values[f"{NAME}/{row.tag}"] = row.value
    for folder, by_step in scalars.items():
        try:
            events = Events(folder, 0, lambda text: _warn(text.partition(";")[0]))
        except OSError as error:
            _warn(f"nothing was written to {folder} ({error.strerror})")
            continue
        for step, values in sorted(by_step.items()):
            events.scalars(values, step)
        for name, png in images.items():
            events.image(name, png, max(by_step))
        events.file.close()


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
