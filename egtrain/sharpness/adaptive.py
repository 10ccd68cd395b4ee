"""How far the loss rises near the weights: in a box, on average under noise, at worst in a ball.

With `adaptive` each weight's distance is relative to its size, so the values do not change when the
weights are rescaled without changing the function. The random draws are the same for all runs.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from egtrain.sharpness.flat import (
    flattened,
    gaussian_vector,
    mean_and_standard_error,
    require_finite,
)
from egtrain.sharpness.frozen_loss import FrozenLoss

CORNER, NOISE, BALL = "sharpness corner", "sharpness noise", "sharpness ball"
LONGEST_STEP = 8.0
"""Of a projected step, in radii: the gradient almost alone decides where on the ball it ends."""


def epsilon_sharpness(loss: FrozenLoss, epsilon: float, *, iterations: int = 10) -> float:
    """Return φ = 100·(max f(x + y) − f(x))/(1 + f(x)) over the box |y_i| ≤ ε(|x_i| + 1).

    The maximum (arXiv 1609.04836) is the best value of `iterations` steps of sign ascent. A step
    goes to the corner that the gradient points to; after each failure it goes half as far, from the
    best point.
    """
    start = loss.parameters
    box = epsilon * (flattened(start).double().abs() + 1)
    # A gradient of zero points to no corner, so one is drawn.
    undecided = gaussian_vector(loss.size, 0, CORNER).to(box).sign() * box

    def stepped(y: Tensor, gradient: Tensor, length: float) -> Tensor:
        corner = torch.where(gradient == 0, undecided, gradient.sign() * box)
        return y + length * (corner - y)

    best, base = ascended(
        loss, torch.ones_like(box), torch.zeros_like(box), stepped, iterations, longest=1.0
    )
    return 100 * (best - base) / (1 + base)


def average_sharpness(
    loss: FrozenLoss, radius: float, *, samples: int = 10, seed: int = 0, adaptive: bool = True
) -> tuple[float, float]:
    """Return the mean of f(x + δ) − f(x) over δ ~ N(0, ρ²·diag(c²)) and its standard error.

    c = |x| if adaptive, else 1 (arXiv 2302.07011).
    """
    start = flattened(loss.parameters).double()
    scale = _scale(start, adaptive)
    base = require_finite(loss.value()[0])
    rises = []
    for number in range(samples):
        noise = gaussian_vector(loss.size, seed, NOISE, number).to(start)
        with loss.at(loss.pieces(start + radius * scale * noise)):
            rises.append(loss.value()[0] - base)
    return mean_and_standard_error(rises)


def worst_sharpness(
    loss: FrozenLoss,
    radius: float,
    *,
    steps: int = 20,
    restarts: int = 1,
    seed: int = 0,
    adaptive: bool = True,
) -> float:
    """Return max f(x + δ) − f(x) over ‖δ/c‖ ≤ ρ (arXiv 2302.07011), by projected gradient ascent.

    c = |x| if adaptive, else 1. The ascent is in u = δ/c, where the gradient is c·∇f, so weights of
    zero do no harm. On a quadratic its long steps make it the power iteration, which finds the
    maximum after enough of them. Each of the `restarts` begins at a random point of the sphere and
    takes `steps` gradients.
    """
    scale = _scale(flattened(loss.parameters).double(), adaptive)

    def stepped(u: Tensor, gradient: Tensor, length: float) -> Tensor:
        norm = torch.linalg.vector_norm(gradient)
        further = u + length * radius * torch.where(norm > 0, gradient / norm, 0.0)
        return further * torch.clamp(radius / torch.linalg.vector_norm(further), max=1.0)

    rise = 0.0
    for number in range(restarts):
        drawn = gaussian_vector(loss.size, seed, BALL, number).to(scale)
        first = radius * drawn / torch.linalg.vector_norm(drawn)
        best, base = ascended(loss, scale, first, stepped, steps, longest=LONGEST_STEP)
        rise = max(rise, best - base)
    return rise


def ascended(
    loss: FrozenLoss,
    scale: Tensor,
    first: Tensor,
    stepped: Callable[[Tensor, Tensor, float], Tensor],
    steps: int,
    *,
    longest: float,
) -> tuple[float, float]:
    """Return the largest f(x + scale·u) seen in an ascent in u, and f(x), which counts as seen.

    After a success the step doubles in length, up to the longest; after a failure it halves and
    starts from the best point again. The number of passes over the sample does not depend on the
    values: one for f(x), `steps` with gradients, and a last one. The ascent starts at u = `first`;
    `stepped` maps (u, the gradient there, a length) to the next u inside the constraint. All
    vectors are flat [size], float64.
    """
    start = flattened(loss.parameters).double()
    base = require_finite(loss.value()[0])
    best, length, trial = -math.inf, longest, first
    point, gradient = first, torch.zeros_like(first)
    for _ in range(steps):
        with loss.at(loss.pieces(start + scale * trial)):
            value, slope = loss.value_and_gradient()
        if math.isfinite(value) and value > best:
            best, point, gradient = value, trial, scale * flattened(slope).double()
            length = min(2 * length, longest)
        else:
            length /= 2
        trial = stepped(point, gradient, length)
    with loss.at(loss.pieces(start + scale * trial)):
        value = loss.value()[0]
    return max(base, best, value if math.isfinite(value) else base), base


def _scale(weights: Tensor, adaptive: bool) -> Tensor:
    return weights.abs() if adaptive else torch.ones_like(weights)
