"""The trace of the Hessian, by Hutchinson's estimator."""

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes

from egtrain.sharpness import metric, spectrum
from egtrain.sharpness.drawing import draw_values
from egtrain.sharpness.metric import Measured, MeasuredModel, Panel, Values
from egtrain.sharpness.records import Row
from egtrain.sharpness.runs import Run


def measure(model: MeasuredModel, samples: int) -> Measured:
    """Return the mean with its standard error, and each sample."""
    found = spectrum.trace(model.loss, samples=samples, seed=metric.SEED)
    values = {"mean": found.mean, "standard_error": found.standard_error}
    return values, {"samples": found.samples}


def rows(values: Values) -> Iterator[Row]:
    """Yield the estimate."""
    yield Row("trace", values["mean"], values["standard_error"], tag="trace", title="trace")


def draw(axes: Axes, runs: Sequence[Run]) -> str:
    """Draw the trace of each run."""
    vectors = len(runs[0].records["trace"].curves["samples"])
    return draw_values(
        axes, runs, "trace", "Trace", f"standard error over {vectors} random vectors"
    )


METRIC = metric.SharpnessMetric(
    default={"samples": 30},
    thorough={"samples": 200},
    cost=lambda p, settings: metric.PRODUCT * p["samples"],
    measure=measure,
    rows=rows,
    panels=(Panel(draw, width="half", of_one_run=False),),
    over_steps=("Trace", "standard error over random vectors"),
)
