"""The largest rise of the loss in a ball, relative to the size of each weight."""

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes

from egtrain.formatting import number as number_text
from egtrain.sharpness.adaptive import worst_sharpness
from egtrain.sharpness.drawing import draw_over_radii
from egtrain.sharpness.metric import (
    GRADIENT_COST,
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

RADII = [0.25, 0.42, 0.7, 1.2, 2.0]
"""Even on a logarithmic axis, over the range that arXiv 2302.07011 publishes for ResNets."""


def cost(settings: Settings) -> float:
    """Return the cost of all ascents."""
    p = settings["worst"]
    return float(GRADIENT_COST * len(p["radii"]) * p["steps"] * p["restarts"])


def measure(model: ModelAtCheckpoint, parameters: Parameters) -> Measured:
    """Return the largest rise that was found at each radius."""
    rises = [
        worst_sharpness(
            model.loss,
            radius,
            steps=parameters["steps"],
            restarts=parameters["restarts"],
            seed=SEED,
        )
        for radius in parameters["radii"]
    ]
    return {"radii": parameters["radii"], "sharpness": rises}, {}


def pairs(record: Record) -> list[tuple[float, float]]:
    """Return radius and rise."""
    return list(zip(record.values["radii"], record.values["sharpness"], strict=True))


def numbers(record: Record) -> Iterator[Number]:
    """Yield the rise at each radius."""
    for radius, rise in pairs(record):
        yield Number("sharpness", rise, radius, tag=f"worst_{radius}")


def rows(record: Record) -> dict[str, str]:
    """Return the rise at the middle radius."""
    radius, rise = pairs(record)[len(record.values["radii"]) // 2]
    return {f"worst ρ={radius:g}": number_text(rise)}


def draw(axes: Axes, runs: Sequence[MeasuredRun]) -> None:
    """Draw the rise over the radius."""
    points = [[(*pair, 0.0) for pair in pairs(run.records["worst"])] for run in runs]
    draw_over_radii(axes, runs, "Worst", points)


METRIC = SharpnessMetric(
    default={"radii": RADII, "steps": 20, "restarts": 1},
    thorough={"radii": RADII, "steps": 20, "restarts": 3},
    cost=cost,
    measure=measure,
    numbers=numbers,
    rows=rows,
    panels=(Panel(draw, size="half"),),
)
