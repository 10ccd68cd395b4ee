"""The metrics of `plot-sharpness`, one file each."""

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from egtrain.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from egtrain.sharpness.metric import SharpnessMetric

METRICS = (
    "eigenvalues",
    "density",
    "trace",
    "line",
    "plane",
    "average",
    "worst",
    "epsilon",
    "between",
)
"""The metrics, each with the name of its file, in the order of measuring."""
LEVEL = "level"
"""Always measured first: loss and metric of the task."""


def metric_of(name: str) -> "SharpnessMetric":
    """Return a metric by the name of its file."""
    # Imported on demand, so that --help does not import torch.
    metric: SharpnessMetric = import_module(f"{__name__}.{name}").METRIC
    return metric


def require_known(names: Sequence[str]) -> None:
    """Raise UsageError if a name is not that of a metric."""
    for name in names:
        if name not in METRICS:
            hint = did_you_mean(name, [*METRICS]) or f"; choose from {', '.join(METRICS)}"
            raise UsageError(f"unknown metric {name!r}{hint}")
