"""The largest eigenvalues of the Hessian and the smallest, by Lanczos' method."""

from collections.abc import Iterator, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from egtrain.figures import show_percent
from egtrain.formatting import FRACTION, number
from egtrain.sharpness import metric, spectrum
from egtrain.sharpness.drawing import draw_points, draw_values
from egtrain.sharpness.metric import Measured, MeasuredModel, Panel, Parameters, Settings
from egtrain.sharpness.records import Row
from egtrain.sharpness.runs import Run

LAMBDA_MAX = r"$\lambda_{\max}$"
ERROR = "Ritz residual"
STORED = ("residuals", "converged", "smallest", "smallest_residual", "smallest_converged")
"""What a record holds beside the largest eigenvalues."""


def steps_of_both(parameters: Parameters, settings: Settings) -> Parameters:
    """Return the parameters with at least the density's steps, if that is measured too.

    They share a basis, so this costs nothing more.
    """
    steps = settings.get("density", parameters)["steps"]
    return {**parameters, "steps": max(parameters["steps"], steps)}


def measure(model: MeasuredModel, count: int, steps: int) -> Measured:
    """Return the eigenvalues with their residuals, and keep the basis for the density."""
    found = spectrum.eigenvalues(model.loss, count=count, steps=steps, seed=metric.SEED)
    model.krylov = found.krylov
    values = {"largest": found.values} | {name: getattr(found, name) for name in STORED}
    return values, {}


def rows(values: metric.Values) -> Iterator[Row]:
    """Yield the largest eigenvalues and the smallest, with a tilde if not converged."""
    for rank, value in enumerate(values["largest"], 1):
        tag, title = ("lambda_max", "λ_max") if rank == 1 else (f"lambda_{rank}", "")
        text = f"{'' if values['converged'][rank - 1] else '~'}{number(value)}"
        yield Row("largest", value, values["residuals"][rank - 1], rank, tag, title, text)
    smallest = values["smallest"]
    text = f"{'' if values['smallest_converged'] else '~'}{number(smallest)}"
    yield Row("smallest", smallest, tag="lambda_min", title="λ_min", text=text)


def draw_test_over_largest(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw the test metric over λ_max, one point per run."""
    levels = [run.records["level"].values for run in runs]
    split = "test" if all("test" in level for level in levels) else "train"
    held_out, training = runs[0].metrics
    score = held_out if split == "test" else training
    largest = [run.records["eigenvalues"].values["largest"][0] for run in runs]
    scores = [level[split][score.name] for level in levels]
    draw_points(axes, runs, [[(x, y, None)] for x, y in zip(largest, scores, strict=True)])
    axes.margins(0.15)
    if score.unit == FRACTION:
        show_percent(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    name = f"{split} {score.label}"
    axes.set(title=f"{name[0].upper()}{name[1:]} over {LAMBDA_MAX}", xlabel=LAMBDA_MAX, ylabel=name)


METRIC = metric.SharpnessMetric(
    default={"count": 1, "steps": 20},
    thorough={"count": 10, "steps": 80},
    cost=lambda p, settings: metric.PRODUCT * p["steps"],
    measure=measure,
    rows=rows,
    panels=(
        Panel(
            partial(draw_values, name="eigenvalues", title=LAMBDA_MAX, error=ERROR),
            width="half",
            of_one_run=False,
        ),
        Panel(draw_test_over_largest, of_one_run=False),
    ),
    over_steps=(LAMBDA_MAX, ERROR),
    adapted=steps_of_both,
)
