"""The metrics of `plot-sharpness`, a file each in this folder."""

from importlib import import_module
from typing import TYPE_CHECKING

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
"""A row for each metric, which is the name of its file, in the order of measuring."""
LEVEL = "level"
"""What is measured before them in any case: loss and metric of the task."""


def metric_of(name: str) -> "SharpnessMetric":
    """Return a metric by the name of its file."""
    # Imported when asked for: it brings torch, which the command line's --help does without.
    metric: SharpnessMetric = import_module(f"{__name__}.{name}").METRIC
    return metric
