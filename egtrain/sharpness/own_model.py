"""Several metrics of a model of one's own by one call, as a table of numbers."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from egtrain.errors import UsageError
from egtrain.formatting import number
from egtrain.sharpness.frozen_loss import FrozenLoss
from egtrain.sharpness.loss_function import LossFunction
from egtrain.sharpness.metrics import metric_of, require_known
from egtrain.tables import Column, table_lines

if TYPE_CHECKING:
    from egtrain.sharpness.records import Record, Row


class Measurements(dict[str, "Record"]):
    """The records by metric, and `loss`, which is always there; as text, a table of the numbers.

    A record's `values` are numbers and short lists, its `curves` are nested lists, such as the
    losses of a line. It counts its `products`, `gradients`, `evaluations` and `seconds`.
    """

    def rows(self) -> list[tuple[str, "Row"]]:
        """Return each number with its metric: its `quantity`, `at`, `value` and `error`."""
        return [
            (metric, row)
            for metric, record in self.items()
            for row in (
                _rows_of_loss(record) if metric == LOSS else metric_of(metric).rows(record.values)
            )
        ]

    def __str__(self) -> str:
        rows = self.rows()
        columns = [
            Column("metric", [metric for metric, _ in rows], left=True),
            Column("quantity", [row.quantity for _, row in rows], left=True),
            Column("at", ["" if row.at is None else f"{row.at:g}" for _, row in rows]),
            Column("value", [row.text or number(row.value) for _, row in rows]),
            Column("error", ["" if row.error is None else number(row.error) for _, row in rows]),
        ]
        return "\n".join(table_lines(columns, None))


LOSS = "loss"
"""The record of the loss itself and of the loss function's metric."""


def measure(
    model: nn.Module,
    loss_function: LossFunction,
    data: Any,
    metrics: Sequence[str] = ("eigenvalues", "trace"),
    *,
    thorough: bool = False,
    names: Sequence[str] | str | None = None,
    dtype: torch.dtype | None = None,
) -> Measurements:
    """Measure metrics of `egtrain plot-sharpness` for a model and data of one's own.

    The random vectors are the same for all models, so that models do not differ by the draws.

    Args:
        model: as for `FrozenLoss`.
        loss_function: as for `FrozenLoss`.
        data: as for `FrozenLoss.of`.
        metrics: their names; all but `between`.
        thorough: with more vectors and points, as `--thorough`.
        names: as for `FrozenLoss`.
        dtype: as for `FrozenLoss`.

    Raises:
        UsageError: as for `FrozenLoss.of`, or a metric is unknown or between two models.
        DivergedError: the loss or its curvature is not finite.
    """
    from egtrain.sharpness.metric import MeasuredModel
    from egtrain.sharpness.metrics import METRICS
    from egtrain.sharpness.recording import measured
    from egtrain.sharpness.records import Record

    wanted = [metrics] if isinstance(metrics, str) else list(metrics)
    require_known(wanted)
    for name in wanted:
        if metric_of(name).from_first_run:
            raise UsageError(
                f"{name} is the line between two models: leave it out of metrics, and call "
                "egtrain.sharpness.between with their weights"
            )
    chosen = {name: metric_of(name) for name in METRICS if name in wanted}
    settings = {name: m.thorough if thorough else m.default for name, m in chosen.items()}
    found = Measurements()
    with FrozenLoss.of(model, loss_function, data, names=names, dtype=dtype) as loss:
        value, metric = loss.value()
        score = {} if math.isnan(metric) else {"metric": metric}
        found[LOSS] = Record({"loss": value, **score}, evaluations=loss.evaluations)
        at = MeasuredModel(loss)
        for name, of_name in chosen.items():
            found[name] = measured(at, name, of_name.adapted(settings[name], settings))
    return found


def _rows_of_loss(record: "Record") -> list["Row"]:
    from egtrain.sharpness.records import Row

    return [Row(quantity, value) for quantity, value in record.values.items()]
