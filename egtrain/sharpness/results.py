"""The results of a comparison as files: sharpness.json, .csv and .npz."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from egtrain.checkpoint import write_atomically
from egtrain.formatting import number, percent
from egtrain.logs.environment import versions
from egtrain.logs.runlog import finite
from egtrain.sharpness.metrics import metric_of
from egtrain.sharpness.records import MeasuredRun, Record

NAME = "sharpness"
"""Of the files."""
LOSS_TOLERANCE = 0.1
"""Training losses that differ by more, relative to the lowest, are warned of."""
CAVEATS = (
    "Read with care: sharpness follows the learning rate more closely than it follows "
    "generalisation, so compare runs of one learning rate first.",
    "λ_max, trace, density and ε-sharpness also change when weights are rescaled in a way that "
    "leaves the function as it is; the adaptive average and worst values do not, nor do the "
    "filter-normalised landscapes where a whole layer, or a filter before BatchNorm, is rescaled.",
)


@dataclass(frozen=True)
class Comparison:
    """Everything that the tables and pictures show."""

    settings: dict[str, Any]
    """`metrics`: the parameters of each; and the options that matter."""
    sample: dict[str, Any]
    """The size of the frozen sample, and its hashes."""
    runs: tuple[MeasuredRun, ...]
    network: str = ""
    """Of the runs, with its data, for the titles."""

    @property
    def title(self) -> str:
        """Return what all runs have in common, in a sentence."""
        seeds = sorted({run.seed for run in self.runs})
        one_seed = f"seed {seeds[0]}"
        several = f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"
        runs = f"{len(self.runs)} runs of " if len(self.runs) > 1 else ""
        return (
            f"{runs}{self.network}, {one_seed if len(seeds) == 1 else several}: sharpness over "
            f"{self.sample['size']:,} training samples"
        )

    @property
    def warnings(self) -> list[str]:
        """Return what the numbers themselves warn of, a sentence each."""
        return [*self._unequal_losses(), *self._not_converged()]

    def _unequal_losses(self) -> Iterator[str]:
        low, high = (found(self.runs, key=lambda run: run.loss) for found in (min, max))
        if high.loss > (1 + LOSS_TOLERANCE) * low.loss:
            yield (
                f"the training losses differ by more than {percent(LOSS_TOLERANCE, 0)} "
                f"({number(low.loss)} of {low.label}, {number(high.loss)} of {high.label}): "
                "sharpness is best compared at equal training loss"
            )

    def _not_converged(self) -> Iterator[str]:
        loose: dict[str, dict[str, None]] = {}
        for run in self.runs:
            for _, metric, record in run.all_records():
                if not metric_of(metric).converged(record):
                    loose.setdefault(metric, {})[run.label] = None
        more = "" if self.settings.get("thorough") else ": use --thorough"
        for metric, labels in loose.items():
            yield (
                f"{metric} of {', '.join(labels)} have not converged (their residuals are in "
                f"{NAME}.json){more}"
            )


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
                "metric": run.metric.name,
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
                **{name: _without_curves(record) for name, record in run.from_first.items()},
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
    for run in comparison.runs:
        for checkpoint, metric, record in run.all_records():
            for name, curve in record.curves.items():
                yield f"{run.label}/{checkpoint.step}/{metric}/{name}", np.asarray(curve, float)


def _rows(comparison: Comparison) -> Iterator[list[object]]:
    for run in comparison.runs:
        for checkpoint, metric, record in run.all_records():
            for quantity, value, at, error, _ in metric_of(metric).numbers(record):
                yield [run.label, checkpoint.step, metric, quantity, at, value, error]
