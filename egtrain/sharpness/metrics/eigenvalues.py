"""The largest eigenvalues of the Hessian and the smallest, by Lanczos' method."""

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from egtrain.figures import show_percent
from egtrain.formatting import FRACTION
from egtrain.formatting import number as number_text
from egtrain.sharpness.drawing import colour, draw_points, markers_of, write_run_numbers
from egtrain.sharpness.metric import (
    PRODUCT_COST,
    SEED,
    Measured,
    ModelAtCheckpoint,
    Number,
    OverSteps,
    Panel,
    Parameters,
    Settings,
    SharpnessMetric,
)
from egtrain.sharpness.records import MeasuredRun, Record
from egtrain.sharpness.spectrum import eigenvalues

LAMBDA_MAX = r"$\lambda_{\max}$"
ERROR = "Ritz residual"


def steps_of_both(parameters: Parameters, settings: Settings) -> Parameters:
    """Return the parameters with as many steps as the density takes, if that is measured too.

    They share a basis, so the larger one costs nothing more.
    """
    steps = settings.get("density", parameters)["steps"]
    return {**parameters, "steps": max(parameters["steps"], steps)}


def measure(model: ModelAtCheckpoint, parameters: Parameters) -> Measured:
    """Return eigenvalues with their residuals, and leave the basis to the density."""
    found = eigenvalues(model.loss, count=parameters["count"], steps=parameters["steps"], seed=SEED)
    model.krylov = found.krylov
    values = {
        "largest": found.largest,
        "residuals": found.residuals,
        "converged": found.converged,
        "smallest": found.smallest,
        "smallest_residual": found.smallest_residual,
        "smallest_converged": found.smallest_converged,
    }
    return values, {}


def largest(record: Record) -> tuple[float, float]:
    """Return λ_max and its residual."""
    return record.values["largest"][0], record.values["residuals"][0]


def numbers(record: Record) -> Iterator[Number]:
    """Yield the largest eigenvalues with their residuals, and the smallest."""
    pairs = zip(record.values["largest"], record.values["residuals"], strict=True)
    for rank, (value, residual) in enumerate(pairs, 1):
        tag = "lambda_max" if rank == 1 else f"lambda_{rank}"
        yield Number("largest", value, rank, residual, tag)
    yield Number("smallest", record.values["smallest"], tag="lambda_min")


def rows(record: Record) -> dict[str, str]:
    """Return λ_max and λ_min, with a tilde where they have not converged."""
    marks = ["" if good else "~" for good in (converged(record), smallest_converged(record))]
    return {
        "λ_max": f"{marks[0]}{number_text(largest(record)[0])}",
        "λ_min": f"{marks[1]}{number_text(record.values['smallest'])}",
    }


def converged(record: Record) -> bool:
    """Return whether λ_max has converged."""
    return bool(record.values["converged"][0])


def smallest_converged(record: Record) -> bool:
    """Return whether λ_min has converged."""
    return bool(record.values["smallest_converged"])


def draw_largest(axes: Axes, runs: Sequence[MeasuredRun]) -> str:
    """Draw λ_max of each run."""
    draw_points(axes, runs, LAMBDA_MAX, [largest(run.records["eigenvalues"]) for run in runs])
    return f"{ERROR} ({LAMBDA_MAX})"


def draw_test_over_largest(axes: Axes, runs: Sequence[MeasuredRun]) -> None:
    """Draw the test metric over λ_max, a point a run."""
    split = "test" if all("test" in run.level for run in runs) else "train"
    metric = runs[0].metric if split == "test" else runs[0].training_metric
    points = [
        (largest(run.records["eigenvalues"])[0], float(run.level[split][metric.name]))
        for run in runs
    ]
    markers = markers_of(runs)
    for number, (run, point) in enumerate(zip(runs, points, strict=True)):
        axes.plot(*point, color=colour(number), marker=markers[run.batch_size], markersize=8)
    axes.margins(0.15)
    write_run_numbers(axes, points)
    if metric.unit == FRACTION:
        show_percent(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    name = f"{split} {metric.label}"
    axes.set_title(f"{name[0].upper()}{name[1:]} over {LAMBDA_MAX}")
    axes.set_xlabel(LAMBDA_MAX)
    axes.set_ylabel(name)


METRIC = SharpnessMetric(
    default={"count": 1, "steps": 20},
    thorough={"count": 10, "steps": 80},
    cost=lambda settings: PRODUCT_COST * settings["eigenvalues"]["steps"],
    measure=measure,
    numbers=numbers,
    rows=rows,
    panels=(
        Panel(draw_largest, size="half", of_one_run=False),
        Panel(draw_test_over_largest, of_one_run=False),
    ),
    over_steps=OverSteps(LAMBDA_MAX, largest, ERROR),
    converged=lambda record: all(record.values["converged"]),
    adapted=steps_of_both,
)
