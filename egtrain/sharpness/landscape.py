"""The loss along filter-normalised directions, and along the line between two runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from egtrain.sharpness.flat import gaussian_vector
from egtrain.sharpness.frozen_loss import FrozenLoss
from egtrain.sharpness.restoring import buffers_kept

DIRECTION = "sharpness direction"


@dataclass(frozen=True)
class Curve:
    """Loss and metric along a line."""

    positions: Tensor
    """α [points], float64."""
    losses: Tensor
    """[points], float64."""
    metrics: Tensor
    """[points], float64."""


@dataclass(frozen=True)
class Surface:
    """Loss and metric on a plane."""

    positions: Tensor
    """α of both directions [points], float64."""
    losses: Tensor
    """[points along the first direction, points along the second], float64."""
    metrics: Tensor
    """[points along the first direction, points along the second], float64."""


def filter_normalised_direction(
    parameters: Sequence[Tensor], seed: int, number: int
) -> list[Tensor]:
    """Return a random direction whose filters have the norms of the weights' (arXiv 1712.09913).

    d_f ← d_f·‖w_f‖/‖d_f‖, where a filter is a slice along dimension 0 of a weight with two or more
    dimensions. Biases and normalisation parameters, with fewer dimensions, do not move. Before
    normalisation the direction depends only on (seed, number) and each parameter's position and
    shape, so it is the same for all runs.
    """
    direction = []
    for index, weights in enumerate(parameters):
        if weights.ndim < 2:
            direction.append(torch.zeros_like(weights))
            continue
        drawn = gaussian_vector(weights.numel(), seed, DIRECTION, number, index).view(weights.shape)
        own = weights.detach().cpu().double().flatten(1)
        scale = own.norm(dim=1) / drawn.flatten(1).norm(dim=1)
        direction.append((drawn * scale.view(-1, *[1] * (weights.ndim - 1))).to(weights))
    return direction


def line(loss: FrozenLoss, direction: Sequence[Tensor], *, points: int, span: float = 1.0) -> Curve:
    """Return the loss at w + α·d for `points` values of α in [−span, span]; if odd, 0 is one."""
    positions = torch.linspace(-span, span, points, dtype=torch.float64)
    start = copied(loss.parameters)
    values = [_value_at(loss, start, (a, direction)) for a in positions.tolist()]
    return Curve(positions, *_columns(values))


def plane(
    loss: FrozenLoss,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    *,
    points: int,
    span: float = 1.0,
) -> Surface:
    """Return the loss at w + α·d₁ + β·d₂ for `points` values of α and of β in [−span, span]."""
    positions = torch.linspace(-span, span, points, dtype=torch.float64)
    start = copied(loss.parameters)
    values = [
        _value_at(loss, start, (a, first), (b, second))
        for a in positions.tolist()
        for b in positions.tolist()
    ]
    losses, metrics = (column.view(points, points) for column in _columns(values))
    return Surface(positions, losses, metrics)


def between(
    loss: FrozenLoss,
    weights_a: Sequence[Tensor],
    weights_b: Sequence[Tensor],
    *,
    points: int,
    low: float = -0.5,
    high: float = 1.5,
    recompute_statistics: Callable[[], None],
) -> Curve:
    """Return the loss at (1 − α)·w_a + α·w_b for `points` values of α in [low, high].

    Buffers are not interpolated: every point uses the model's, after `recompute_statistics` has
    changed them there. In the end they are as before.
    """
    positions = torch.linspace(low, high, points, dtype=torch.float64)
    values = []
    with buffers_kept(loss.model):
        for a in positions.tolist():
            pairs = zip(weights_a, weights_b, strict=True)
            with loss.at([(1 - a) * w.detach() + a * v.detach() for w, v in pairs]):
                recompute_statistics()
                values.append(loss.value())
    return Curve(positions, *_columns(values))


def forward_of_first(model: nn.Module, batch: Any) -> object:
    """Call the model on the first part of a batch, which usually is the inputs."""
    return model(batch[0])


def recompute_batchnorm(
    model: nn.Module,
    batches: Sequence[tuple[Any, int]],
    forward: Callable[[nn.Module, Any], object] = forward_of_first,
) -> None:
    """Set the BatchNorm statistics to those of these batches at the current weights.

    Each sample counts the same. The rest of the model stays in its mode. `between` restores the old
    statistics in the end.

    Args:
        model: layers without running statistics are left alone; without any BatchNorm nothing is
            computed.
        batches: pairs (batch, number of samples); all of them, on each rank.
        forward: runs the model on a batch; a loss function will do.
    """
    # A single sample may have no variance; then torch refuses it.
    usable = [(batch, size) for batch, size in batches if size > 1] or list(batches)
    seen = 0
    with torch.no_grad(), batchnorm_training(model) as layers:
        for batch, size in usable if layers else []:
            seen += size
            for layer in layers:
                layer.momentum = size / seen
            forward(model, batch)


@contextmanager
def batchnorm_training(model: nn.Module) -> Iterator[list[_BatchNorm]]:
    """Put only the BatchNorm layers with statistics into training mode inside the block."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(layer, layer.training, layer.momentum) for layer in layers]
    try:
        for layer in layers:
            layer.training = True
        yield layers
    finally:
        for layer, training, momentum in before:
            layer.training, layer.momentum = training, momentum


def copied(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies without a graph."""
    return [t.detach().clone() for t in tensors]


def _value_at(
    loss: FrozenLoss, start: Sequence[Tensor], *moves: tuple[float, Sequence[Tensor]]
) -> tuple[float, float]:
    """Return the loss and the metric at the start plus multiples of directions."""
    weights = copied(start)
    for factor, direction in moves:
        for w, d in zip(weights, direction, strict=True):
            w.add_(d, alpha=factor)
    with loss.at(weights):
        return loss.value()


def _columns(values: Sequence[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    table = torch.tensor(values, dtype=torch.float64)
    return table[:, 0], table[:, 1]
