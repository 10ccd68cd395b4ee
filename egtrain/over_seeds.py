"""Mean and standard deviation over the seeds of runs that are otherwise equal."""

import statistics
from collections.abc import Sequence


def mean_of(values: Sequence[float]) -> float | None:
    """Return the mean; None of nothing."""
    return statistics.fmean(values) if values else None


def deviation_of(values: Sequence[float]) -> float | None:
    """Return the standard deviation of a sample (n - 1); None of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None
