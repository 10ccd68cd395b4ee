"""The mean rise of the loss under noise relative to the size of each weight."""

from collections.abc import Iterator
from functools import partial

from egtrain.sharpness import adaptive, metric
from egtrain.sharpness.drawing import draw_over_radii
from egtrain.sharpness.metric import Measured, MeasuredModel, Panel, Values
from egtrain.sharpness.records import Row

RADII = [0.05, 0.08, 0.14, 0.24, 0.4]
"""Evenly spaced on a logarithmic axis, over the range of arXiv 2302.07011 for ResNets."""


def measure(model: MeasuredModel, radii: list[float], samples: int) -> Measured:
    """Return the mean rise and its standard error at each radius."""
    pairs = [
        adaptive.average_sharpness(model.loss, radius, samples=samples, seed=metric.SEED)
        for radius in radii
    ]
    means, errors = map(list, zip(*pairs, strict=True))
    return {"radii": radii, "mean": means, "standard_error": errors}, {}


def rows(values: Values) -> Iterator[Row]:
    """Yield the mean rise at each radius; that of the middle one is printed."""
    radii = values["radii"]
    for radius, mean, error in zip(radii, values["mean"], values["standard_error"], strict=True):
        title = f"average ρ={radius:g}" if radius == radii[len(radii) // 2] else ""
        yield Row("sharpness", mean, error, radius, f"average_{radius}", title)


DRAW = partial(
    draw_over_radii, name="average", title="Average", error="standard error over the draws"
)
METRIC = metric.SharpnessMetric(
    default={"radii": RADII, "samples": 10},
    thorough={"radii": RADII, "samples": 100},
    cost=lambda p, settings: len(p["radii"]) * p["samples"],
    measure=measure,
    rows=rows,
    panels=(Panel(DRAW, width="half"),),
)
