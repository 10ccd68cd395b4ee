"""The mean rise of the loss under noise, relative to the size of each weight."""

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes

from egtrain.formatting import estimate_text
from egtrain.sharpness.adaptive import average_sharpness
from egtrain.sharpness.drawing import draw_over_radii
from egtrain.sharpness.metric import (
    PASS_COST,
    SEED,
    Measured,
    ModelAtCheckpoint,
    Number,
    Panel,
    Parameters,
    Settings,
    SharpnessMetric,
)
from egtrain.sharpness.records import MeasuredRun, Record

RADII = [0.05, 0.08, 0.14, 0.24, 0.4]
"""Even on a logarithmic axis, over the range that arXiv 2302.07011 publishes for ResNets."""


def cost(settings: Settings) -> float:
    """Return the cost of all draws."""
    p = settings["average"]
    return float(PASS_COST * len(p["radii"]) * p["samples"])


def measure(model: ModelAtCheckpoint, parameters: Parameters) -> Measured:
    """Return the mean rise and its standard error at each radius."""
    pairs = [
        average_sharpness(model.loss, radius, samples=parameters["samples"], seed=SEED)
        for radius in parameters["radii"]
    ]
    means, errors = map(list, zip(*pairs, strict=True))
    return {"radii": parameters["radii"], "mean": means, "standard_error": errors}, {}


def triples(record: Record) -> list[tuple[float, float, float]]:
    """Return radius, mean and standard error."""
    values = record.values
    return list(zip(values["radii"], values["mean"], values["standard_error"], strict=True))


def numbers(record: Record) -> Iterator[Number]:
    """Yield the mean rise at each radius."""
    for radius, mean, error in triples(record):
        yield Number("sharpness", mean, radius, error, f"average_{radius}")


def rows(record: Record) -> dict[str, str]:
    """Return the mean rise at the middle radius."""
    radius, mean, error = triples(record)[len(record.values["radii"]) // 2]
    return {f"average ρ={radius:g}": estimate_text(mean, error)}


def draw(axes: Axes, runs: Sequence[MeasuredRun]) -> str:
    """Draw the mean rise over the radius."""
    draw_over_radii(axes, runs, "Average", [triples(run.records["average"]) for run in runs])
    return "standard error over the draws (average)"


METRIC = SharpnessMetric(
    default={"radii": RADII, "samples": 10},
    thorough={"radii": RADII, "samples": 100},
    cost=cost,
    measure=measure,
    numbers=numbers,
    rows=rows,
    panels=(Panel(draw, size="half"),),
)
