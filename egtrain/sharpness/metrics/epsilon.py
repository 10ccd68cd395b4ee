"""The largest rise of the loss in a box around the weights, in percent."""

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes

from egtrain.formatting import number as number_text
from egtrain.sharpness.adaptive import epsilon_sharpness
from egtrain.sharpness.drawing import draw_points, split
from egtrain.sharpness.metric import (
    GRADIENT_COST,
    Measured,
    ModelAtCheckpoint,
    Number,
    Panel,
    Parameters,
    Settings,
    SharpnessMetric,
)
from egtrain.sharpness.records import MeasuredRun, Record


def cost(settings: Settings) -> float:
    """Return the cost of all ascents."""
    p = settings["epsilon"]
    return float(GRADIENT_COST * len(p["sizes"]) * p["iterations"])


def measure(model: ModelAtCheckpoint, parameters: Parameters) -> Measured:
    """Return the sharpness in a box of each size."""
    found = [
        epsilon_sharpness(model.loss, size, iterations=parameters["iterations"])
        for size in parameters["sizes"]
    ]
    return {"sizes": parameters["sizes"], "sharpness": found}, {}


def numbers(record: Record) -> Iterator[Number]:
    """Yield the sharpness at each size."""
    for size, value in zip(record.values["sizes"], record.values["sharpness"], strict=True):
        yield Number("sharpness", value, size, tag=f"epsilon_{size}")


def rows(record: Record) -> dict[str, str]:
    """Return the sharpness at the first size."""
    size, value = record.values["sizes"][0], record.values["sharpness"][0]
    return {f"ε-sharpness ε={size:g}": number_text(value)}


def draw(axes: Axes, runs: Sequence[MeasuredRun]) -> None:
    """Draw the sharpness of each run, a place for each size."""
    records = [run.records["epsilon"].values for run in runs]
    sizes = records[0]["sizes"]
    places = split(axes, len(sizes))
    places[0].set_ylabel("ε-sharpness (%)")
    for number, (place, size) in enumerate(zip(places, sizes, strict=True)):
        values = [(values["sharpness"][number], 0.0) for values in records]
        draw_points(place, runs, f"ε = {size:g}", values)


METRIC = SharpnessMetric(
    default={"sizes": [1e-3], "iterations": 10},
    thorough={"sizes": [1e-3, 5e-4], "iterations": 10},
    cost=cost,
    measure=measure,
    numbers=numbers,
    rows=rows,
    panels=(Panel(draw, picture="sharpness-paths", of_one_run=False),),
)
