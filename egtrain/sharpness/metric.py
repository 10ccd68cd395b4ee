"""What a metric of `plot-sharpness` consists of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes
from torch import Tensor

from egtrain.sharpness.frozen_loss import FrozenLoss
from egtrain.sharpness.records import MeasuredRun, Record
from egtrain.sharpness.spectrum import Krylov
from egtrain.tasks import Task

Parameters = dict[str, Any]
Settings = Mapping[str, Parameters]
"""The parameters of all metrics that are measured, by name."""
Measured = tuple[dict[str, Any], dict[str, Any]]
"""Values, which are numbers and short lists, and curves, which are nested lists."""

SEED = 0
"""Of every random vector: all runs share them, so that differences between runs are not those of
draws."""
PASS_COST, GRADIENT_COST, PRODUCT_COST = 1.0, 3.0, 10.0
"""Time of an evaluation of the loss, of a gradient and of a Hessian-vector product, relative to the
first: measured with a ResNet on a CPU."""


@dataclass
class ModelAtCheckpoint:
    """A model with the weights of a checkpoint, and what its metrics share."""

    loss: FrozenLoss
    """Over the frozen sample."""
    task: Task
    batches: Sequence[tuple[Any, int]]
    """The frozen sample: pairs (batch, number of samples)."""
    first_weights: Sequence[Tensor]
    """Those of the first run."""
    test: dict[str, float] | None
    """Loss and metric on the test split."""
    krylov: Krylov | None = None
    """The basis of the eigenvalues, while the density can still go on from it."""


class Number(NamedTuple):
    """One number of a record, as it stands in the table and in TensorBoard."""

    quantity: str
    value: float
    at: float | str = ""
    """Which one: a rank, a radius or a size."""
    error: float | str = ""
    tag: str | None = None
    """Its name in TensorBoard; None where it is not shown there."""


@dataclass(frozen=True)
class Panel:
    """A panel of a picture, in which all runs are drawn."""

    draw: Callable[[Axes, Sequence[MeasuredRun]], str | None]
    """Returns what its error bars or bands are, for the title."""
    size: Literal["half", "whole", "row"] = "whole"
    """Two halves share the place of one; a row is as wide as the picture where there are several
    runs."""
    picture: Literal["sharpness", "sharpness-paths"] = "sharpness"
    of_one_run: bool = True
    """Whether it shows anything of a single run."""


@dataclass(frozen=True)
class OverSteps:
    """How a number is drawn over the steps of the training."""

    title: str
    value: Callable[[Record], tuple[float, float]]
    """Returns the number and its error."""
    error: str
    """What the error is."""


@dataclass(frozen=True)
class SharpnessMetric:
    """What is measured, what it costs, which numbers it gives and how they are drawn."""

    default: Parameters
    thorough: Parameters
    """With --thorough."""
    cost: Callable[[Settings], float]
    """Its time, in evaluations of the loss."""
    measure: Callable[[ModelAtCheckpoint, Parameters], Measured]
    numbers: Callable[[Record], Iterable[Number]] = lambda record: ()
    """What the table of results and TensorBoard get."""
    rows: Callable[[Record], dict[str, str]] = lambda record: {}
    """What is printed: texts by the name of the row."""
    panels: tuple[Panel, ...] = ()
    over_steps: OverSteps | None = None
    """Where it is measured of earlier checkpoints too."""
    converged: Callable[[Record], bool] = lambda record: True
    adapted: Callable[[Parameters, Settings], Parameters] = lambda parameters, settings: parameters
    """Returns its parameters beside those of the other metrics."""
    from_first_run: bool = False
    """Whether it is measured between the first run and each other one."""
