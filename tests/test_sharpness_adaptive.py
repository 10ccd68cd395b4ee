"""Sharpness in a box, on average and at worst, against quadratics where each is known."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from sharpness_models import fingerprint, frozen, net, quadratic, rescale, symmetric
from torch import Tensor

from egtrain.errors import DivergedError
from egtrain.sharpness.adaptive import average_sharpness, epsilon_sharpness, worst_sharpness
from egtrain.sharpness.frozen_loss import FrozenLoss

WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -0.1], dtype=torch.float64)
MIXED = symmetric([-3.9, -1.0, 0.0, 1.0, 2.0, 4.0])


def scale_of(adaptive: bool) -> Tensor:
    return WEIGHTS.abs() if adaptive else torch.ones_like(WEIGHTS)


@pytest.mark.parametrize("adaptive", [True, False])
def test_average_on_a_quadratic_is_half_the_trace_of_the_scaled_matrix(adaptive: bool) -> None:
    radius = 0.3
    with quadratic(MIXED, WEIGHTS) as loss:
        mean, error = average_sharpness(loss, radius, samples=1500, seed=0, adaptive=adaptive)
    exact = 0.5 * radius**2 * float((scale_of(adaptive) ** 2 * MIXED.diagonal()).sum())
    assert abs(mean - exact) < 3 * error
    assert error < 0.1 * abs(exact) + 0.02


def test_average_of_one_sample_has_no_error_and_of_many_its_own() -> None:
    with quadratic(MIXED, WEIGHTS) as loss:
        values = [average_sharpness(loss, 0.3, samples=count, seed=0) for count in (1, 2)]
        assert loss.evaluations == 2 + 3
    (first, none), (mean, error) = values
    assert math.isnan(none)
    assert error == pytest.approx(abs(mean - first))


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize(
    "matrix",
    [
        symmetric([0.1, 0.2, 0.5, 1.0, 2.0, 4.0]),
        MIXED,
        symmetric([2.0] * 3 + [0.0] * 3),
        torch.block_diag(symmetric([1.0, 2.0, 3.0]), symmetric([0.5, 5.0, 6.0])),
    ],
    ids=["positive", "mixed", "repeated", "blocks"],
)
def test_worst_on_a_quadratic_is_half_the_largest_eigenvalue_of_the_scaled_matrix(
    matrix: Tensor, adaptive: bool
) -> None:
    radius, c = 0.5, scale_of(adaptive)
    with quadratic(matrix, WEIGHTS) as loss:
        found = worst_sharpness(loss, radius, steps=150, seed=0, adaptive=adaptive)
    largest = float(torch.linalg.eigvalsh(c[:, None] * matrix * c)[-1])
    assert found == pytest.approx(0.5 * radius**2 * largest, rel=1e-6)


def test_twenty_steps_come_within_a_percent() -> None:
    matrix = symmetric([-0.5, 0.0, 0.1, 0.2, 1.0, 2.0])
    with quadratic(matrix, WEIGHTS) as loss:
        found = worst_sharpness(loss, 0.5, steps=20, seed=0, adaptive=False)
        assert (loss.gradients, loss.evaluations) == (20, 2)
    assert found == pytest.approx(0.5 * 0.5**2 * 2.0, rel=1e-2)


def test_worst_away_from_a_minimum_is_that_of_the_ball() -> None:
    """Where the loss is a plane the maximum lies along the gradient; where it has a peak in the
    ball, there.
    """
    gradient = torch.linspace(1, 2, 6, dtype=torch.float64)
    narrow = 1e-9 * torch.eye(6, dtype=torch.float64)
    with quadratic(narrow, WEIGHTS - 1e9 * gradient, at=WEIGHTS) as loss:
        found = worst_sharpness(loss, 0.5, steps=5, seed=0, adaptive=False)
    assert found == pytest.approx(0.5 * float(gradient.norm()), rel=1e-6)

    peak = -torch.diag(torch.tensor([1.0, 2, 3, 1, 2, 3], dtype=torch.float64))
    with quadratic(peak, WEIGHTS + 0.1, at=WEIGHTS) as loss:
        found = worst_sharpness(loss, 1.0, steps=80, seed=0, adaptive=False)
    assert found == pytest.approx(0.5 * 0.1**2 * 12, rel=1e-4)


def test_restarts_go_on_from_other_points_and_keep_the_best() -> None:
    with frozen(net("tanh")) as loss:
        one = worst_sharpness(loss, 1.0, steps=3, seed=0)
        three = worst_sharpness(loss, 1.0, steps=3, restarts=3, seed=0)
        assert loss.gradients == 3 + 9
    assert three >= one > 0


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_every_point_of_the_ascent_lies_in_the_ball(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited = visits(monkeypatch)
    with quadratic(MIXED, WEIGHTS + 0.1, at=WEIGHTS) as loss:
        worst_sharpness(loss, 0.5, steps=steps, seed=0)
    assert len(visited) == steps + 1
    for point in visited:
        away = point - WEIGHTS
        assert away[3] == 0  # the zero weight, and only it, stands still
        kept = WEIGHTS != 0
        assert float((away[kept] / WEIGHTS[kept]).norm()) <= 0.5 * (1 + 1e-12)
        assert (away[kept] != 0).all()


@pytest.mark.parametrize("iterations", [1, 10])
def test_every_point_of_the_sign_ascent_lies_in_the_box(
    iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited = visits(monkeypatch)
    with quadratic(MIXED, WEIGHTS + 0.1, at=WEIGHTS) as loss:
        epsilon_sharpness(loss, 1e-2, iterations=iterations)
    assert len(visited) == iterations + 1
    for point in visited:
        assert ((point - WEIGHTS).abs() <= 1e-2 * (WEIGHTS.abs() + 1) * (1 + 1e-12)).all()


def visits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the list of weights that losses are going to be measured at."""
    visited: list[Tensor] = []
    at = FrozenLoss.at

    def noted(self: FrozenLoss, weights: list[Tensor]) -> object:
        visited.append(weights[0].detach().clone())
        return at(self, weights)

    monkeypatch.setattr(FrozenLoss, "at", noted)
    return visited


@pytest.mark.parametrize(
    "matrix",
    [
        torch.diag(torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.float64)),
        symmetric([0.1, 0.2, 0.5, 1.0, 2.0, 40.0]),
    ],
    ids=["diagonal", "one steep direction"],
)
@pytest.mark.parametrize("distance", [0.0, 0.05])
def test_epsilon_sharpness_of_a_convex_function_is_its_value_at_the_highest_corner(
    matrix: Tensor, distance: float
) -> None:
    epsilon, minimum = 0.1, WEIGHTS - distance
    box = epsilon * (WEIGHTS.abs() + 1)

    def value(at: Tensor) -> float:
        return float(0.5 * (at - minimum) @ matrix @ (at - minimum))

    corners = (
        torch.tensor(signs, dtype=torch.float64) * box
        for signs in itertools.product((-1, 1), repeat=6)
    )
    highest = max(value(WEIGHTS + corner) for corner in corners)
    with quadratic(matrix, minimum, at=WEIGHTS) as loss:
        found = epsilon_sharpness(loss, epsilon)
    base = value(WEIGHTS)
    assert found == pytest.approx(100 * (highest - base) / (1 + base), rel=1e-9)


def test_epsilon_sharpness_of_a_peak_is_that_of_its_top_and_on_it_zero() -> None:
    peak = -torch.eye(1, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    with quadratic(peak, one + 0.013, at=one) as loss:
        below = loss.value()[0]
        assert epsilon_sharpness(loss, 0.05, iterations=20) == pytest.approx(
            -100 * below / (1 + below), rel=1e-3
        )
    with quadratic(peak, one) as loss:
        assert epsilon_sharpness(loss, 0.05) == 0


@pytest.mark.parametrize(
    "measure",
    [
        lambda loss: average_sharpness(loss, 0.1, samples=3, seed=0)[0],
        lambda loss: worst_sharpness(loss, 0.5, steps=5, seed=0),
    ],
    ids=["average", "worst"],
)
def test_adaptive_values_do_not_change_when_a_layer_is_rescaled(
    measure: Callable[[FrozenLoss], float],
) -> None:
    model = net("relu")
    values, losses = [], []
    for factor in (1.0, 10.0):
        rescale(model, factor)
        with frozen(model) as loss:
            losses.append(loss.value()[0])
            values.append(measure(loss))
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert values[1] == pytest.approx(values[0], rel=1e-9)
    assert values[0] > 0


def test_the_others_do_change() -> None:
    model = net("relu")
    values = []
    for factor in (1.0, 10.0):
        rescale(model, factor)
        with frozen(model) as loss:
            values.append(worst_sharpness(loss, 0.5, steps=5, seed=0, adaptive=False))
    assert values[1] > 2 * values[0]


def test_nothing_moves_at_radius_zero_and_the_model_is_as_before() -> None:
    model = net("convolution")
    before = fingerprint(model)
    with frozen(model) as loss:
        assert average_sharpness(loss, 0.0, samples=2, seed=0) == (0.0, 0.0)
        assert worst_sharpness(loss, 0.0, steps=2, seed=0) == pytest.approx(0.0, abs=1e-12)
        assert epsilon_sharpness(loss, 0.0, iterations=2) == pytest.approx(0.0, abs=1e-12)
        average_sharpness(loss, 1.0, samples=2, seed=0)
        worst_sharpness(loss, 1.0, steps=2, seed=0)
        epsilon_sharpness(loss, 0.1, iterations=2)
    assert fingerprint(model) == before


def test_a_step_beyond_all_numbers_is_not_taken() -> None:
    matrix, zero = torch.eye(2, dtype=torch.float64) * 1e300, torch.zeros(2, dtype=torch.float64)
    with quadratic(matrix, zero) as loss:
        found = worst_sharpness(loss, 1e5, steps=30, seed=0, adaptive=False)
    assert 0 <= found < math.inf
    with quadratic(matrix, zero, at=zero + math.inf) as loss, pytest.raises(DivergedError):
        worst_sharpness(loss, 1.0, steps=2, seed=0)
