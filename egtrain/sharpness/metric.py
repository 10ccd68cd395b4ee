"""What a metric of `plot-sharpness` consists of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes
from torch import Tensor

from egtrain.sharpness.frozen_loss import FrozenLoss
from egtrain.sharpness.records import Row
from egtrain.sharpness.runs import Run
from egtrain.sharpness.spectrum import Krylov
from egtrain.tasks import Task

Parameters = dict[str, Any]
Settings = Mapping[str, Parameters]
"""The parameters of all metrics to be measured, by name."""
Values = Mapping[str, Any]
Measured = tuple[dict[str, Any], dict[str, Any]]
"""Values, which are numbers and short lists, and curves, which are nested lists."""

SEED = 0
"""Of every random vector: all runs share them, so runs do not differ by the draws."""
GRADIENT, PRODUCT = 3.0, 10.0
"""Time of a gradient and of a Hessian-vector product, in evaluations of the loss; measured on a CPU
with a ResNet."""


@dataclass
class MeasuredModel:
    """A model, and what its metrics share."""

    loss: FrozenLoss
    """Over the frozen sample."""
    krylov: Krylov | None = field(default=None, kw_only=True)
    """The basis of the eigenvalues, until the density has reused it."""


@dataclass
class ModelAtCheckpoint(MeasuredModel):
    """A model of a run with the weights of a checkpoint."""

    task: Task
    batches: Sequence[tuple[Any, int]]
    """The frozen sample: pairs (batch, number of samples)."""
    first_weights: Sequence[Tensor]
    """The first run's weights."""
    test: dict[str, float] | None
    """Loss and metric on the test split."""


class Panel(NamedTuple):
    """A panel of a picture, in which all runs are drawn."""

    draw: Callable[[Axes, Sequence[Run]], str | None]
    """Returns the meaning of its error bars or bands, for the title of the picture."""
    width: Literal["half", "whole", "row"] = "whole"
    """Two `half` panels share one place; `row` takes a whole row if there are several runs."""
    picture: Literal["sharpness", "sharpness-paths"] = "sharpness"
    of_one_run: bool = True
    """Whether it is drawn for a single run."""


@dataclass(frozen=True)
class SharpnessMetric:
    """A metric: how it is measured, what it costs, which numbers it gives, how they are drawn."""

    default: Parameters
    thorough: Parameters
    """With --thorough."""
    cost: Callable[[Parameters, Settings], float]
    """Returns its time in evaluations of the loss, from its parameters and those of all metrics."""
    measure: Callable[..., Measured]
    """Takes a MeasuredModel and the parameters as keywords; a ModelAtCheckpoint if the metric is
    `from_first_run`."""
    rows: Callable[[Values], Iterable[Row]] = lambda values: ()
    panels: tuple[Panel, ...] = ()
    over_steps: tuple[str, str] | None = None
    """The title and the meaning of the error, if its first row is also measured at earlier
    checkpoints and drawn over the training steps."""
    adapted: Callable[[Parameters, Settings], Parameters] = lambda parameters, settings: parameters
    """Returns its parameters, adapted to those of the other metrics."""
    from_first_run: bool = False
    """Whether it is measured between the first run and each other run."""
