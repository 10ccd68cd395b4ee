"""The trace of the Hessian, by Hutchinson's estimator."""

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes

from egtrain.formatting import estimate_text
from egtrain.sharpness.drawing import draw_points
from egtrain.sharpness.metric import (
    PRODUCT_COST,
    SEED,
    Measured,
    ModelAtCheckpoint,
    Number,
    OverSteps,
    Panel,
    Parameters,
    SharpnessMetric,
)
from egtrain.sharpness.records import MeasuredRun, Record
from egtrain.sharpness.spectrum import trace


def measure(model: ModelAtCheckpoint, parameters: Parameters) -> Measured:
    """Return the mean with its standard error, and each sample."""
    found = trace(model.loss, samples=parameters["samples"], seed=SEED)
    values = {"mean": found.mean, "standard_error": found.standard_error}
    return values, {"samples": found.samples}


def mean_and_error(record: Record) -> tuple[float, float]:
    """Return the estimate and its standard error."""
    return record.values["mean"], record.values["standard_error"]


def numbers(record: Record) -> Iterator[Number]:
    """Yield the estimate."""
    mean, error = mean_and_error(record)
    yield Number("trace", mean, error=error, tag="trace")


def rows(record: Record) -> dict[str, str]:
    """Return the estimate with its standard error."""
    mean, error = mean_and_error(record)
    return {"trace": estimate_text(mean, error)}


def draw(axes: Axes, runs: Sequence[MeasuredRun]) -> str:
    """Draw the trace of each run."""
    draw_points(axes, runs, "Trace", [mean_and_error(run.records["trace"]) for run in runs])
    vectors = len(runs[0].records["trace"].curves["samples"])
    return f"standard error over {vectors} random vectors (trace)"


METRIC = SharpnessMetric(
    default={"samples": 30},
    thorough={"samples": 200},
    cost=lambda settings: PRODUCT_COST * settings["trace"]["samples"],
    measure=measure,
    numbers=numbers,
    rows=rows,
    panels=(Panel(draw, size="half", of_one_run=False),),
    over_steps=OverSteps("Trace", mean_and_error, "standard error over random vectors"),
)
