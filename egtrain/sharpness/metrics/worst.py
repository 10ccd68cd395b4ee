"""The largest rise of the loss in a ball relative to the size of each weight."""

from collections.abc import Iterator
from functools import partial

from egtrain.sharpness import adaptive, metric
from egtrain.sharpness.drawing import draw_over_radii
from egtrain.sharpness.metric import Measured, MeasuredModel, Panel, Values
from egtrain.sharpness.records import Row

RADII = [0.25, 0.42, 0.7, 1.2, 2.0]
"""Evenly spaced on a logarithmic axis, over the range of arXiv 2302.07011 for ResNets."""


def measure(model: MeasuredModel, radii: list[float], steps: int, restarts: int) -> Measured:
    """Return the largest rise that was found at each radius."""
    rises = [
        adaptive.worst_sharpness(
            model.loss, radius, steps=steps, restarts=restarts, seed=metric.SEED
        )
        for radius in radii
    ]
    return {"radii": radii, "sharpness": rises}, {}


def rows(values: Values) -> Iterator[Row]:
    """Yield the rise at each radius; that of the middle one is printed."""
    radii = values["radii"]
    for radius, rise in zip(radii, values["sharpness"], strict=True):
        title = f"worst ρ={radius:g}" if radius == radii[len(radii) // 2] else ""
        yield Row("sharpness", rise, at=radius, tag=f"worst_{radius}", title=title)


METRIC = metric.SharpnessMetric(
    default={"radii": RADII, "steps": 20, "restarts": 1},
    thorough={"radii": RADII, "steps": 20, "restarts": 3},
    cost=lambda p, settings: metric.GRADIENT * len(p["radii"]) * p["steps"] * p["restarts"],
    measure=measure,
    rows=rows,
    panels=(Panel(partial(draw_over_radii, name="worst", title="Worst"), width="half"),),
)
