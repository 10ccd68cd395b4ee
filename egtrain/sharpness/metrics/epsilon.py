"""The largest rise of the loss in a box around the weights, in percent."""

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes

from egtrain.sharpness import adaptive, metric
from egtrain.sharpness.drawing import draw_values, split
from egtrain.sharpness.metric import Measured, MeasuredModel, Panel, Values
from egtrain.sharpness.records import Row
from egtrain.sharpness.runs import Run


def measure(model: MeasuredModel, sizes: list[float], iterations: int) -> Measured:
    """Return the sharpness in a box of each size."""
    found = [adaptive.epsilon_sharpness(model.loss, e, iterations=iterations) for e in sizes]
    return {"sizes": sizes, "sharpness": found}, {}


def rows(values: Values) -> Iterator[Row]:
    """Yield the sharpness at each size; the first one is printed."""
    for size, value in zip(values["sizes"], values["sharpness"], strict=True):
        title = f"ε-sharpness ε={size:g}" if size == values["sizes"][0] else ""
        yield Row("sharpness", value, at=size, tag=f"epsilon_{size}", title=title)


def draw(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw the sharpness of each run, one panel per size."""
    rows = runs[0].checkpoints[-1].rows("epsilon")
    places = split(axes, len(rows))
    for number, (place, row) in enumerate(zip(places, rows, strict=True)):
        draw_values(place, runs, "epsilon", f"ε = {row.at:g}", row=number)
    places[0].set_ylabel("ε-sharpness (%)")


METRIC = metric.SharpnessMetric(
    default={"sizes": [1e-3], "iterations": 10},
    thorough={"sizes": [1e-3, 5e-4], "iterations": 10},
    cost=lambda p, settings: metric.GRADIENT * len(p["sizes"]) * p["iterations"],
    measure=measure,
    rows=rows,
    panels=(Panel(draw, picture="sharpness-paths", of_one_run=False),),
)
