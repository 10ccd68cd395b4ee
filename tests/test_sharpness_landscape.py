"""Directions, lines and planes: parabolas on quadratics, and statistics recomputed between two
runs.
"""

import math

import pytest
import torch
from sharpness_models import (
    batches_of,
    classification,
    fingerprint,
    frozen,
    net,
    quadratic,
    rescale,
    samples,
    symmetric,
)
from torch import Tensor, nn

from egtrain.sharpness.frozen_loss import FrozenLoss
from egtrain.sharpness.landscape import (
    between,
    filter_normalised_direction,
    line,
    plane,
    recompute_batchnorm,
)

MATRIX = symmetric([-1.0, 0.0, 0.5, 2.0, 3.0])
MINIMUM = torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
FIRST = torch.tensor([0.3, -0.2, 1.0, 0.0, 0.4], dtype=torch.float64)
SECOND = torch.tensor([-1.0, 0.1, 0.2, 0.5, 0.0], dtype=torch.float64)


def value(weights: Tensor) -> float:
    away = weights - MINIMUM
    return float(0.5 * away @ MATRIX @ away)


def test_a_line_through_a_quadratic_is_a_parabola() -> None:
    with quadratic(MATRIX, MINIMUM, at=MINIMUM) as loss:
        curve = line(loss, [FIRST], points=9, span=2.0)
    assert curve.positions.tolist() == [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
    torch.testing.assert_close(curve.losses, 0.5 * curve.positions**2 * (FIRST @ MATRIX @ FIRST))
    assert curve.losses[4] == 0


def test_a_plane_has_the_first_direction_along_its_rows() -> None:
    start = MINIMUM + 0.3
    with quadratic(MATRIX, MINIMUM, at=start) as loss:
        surface = plane(loss, [FIRST], [SECOND], points=3, span=1.0)
    for row, a in enumerate((-1, 0, 1)):
        for column, b in enumerate((-1, 0, 1)):
            assert float(surface.losses[row, column]) == pytest.approx(
                value(start + a * FIRST + b * SECOND)
            )


def test_the_middle_of_a_line_is_the_model_itself() -> None:
    model = net("convolution")
    before = fingerprint(model)
    with frozen(model) as loss:
        direction = filter_normalised_direction(loss.parameters, 0, 0)
        curve = line(loss, direction, points=3)
        assert (float(curve.losses[1]), float(curve.metrics[1])) == loss.value()
        with loss.at([p + d for p, d in zip(loss.parameters, direction, strict=True)]):
            assert (float(curve.losses[2]), float(curve.metrics[2])) == pytest.approx(loss.value())
    assert fingerprint(model) == before


def test_each_filter_of_a_direction_has_the_norm_of_the_weights_and_the_rest_stands_still() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 6), nn.Embedding(7, 2)
    ).double()
    with torch.no_grad():
        model[2].weight[1] = 0.0
    parameters = list(model.parameters())
    direction = filter_normalised_direction(parameters, 0, 0)
    for weights, moves in zip(parameters, direction, strict=True):
        assert moves.shape == weights.shape
        if weights.ndim == 1:
            assert not moves.any()
        else:
            torch.testing.assert_close(
                moves.flatten(1).norm(dim=1), weights.detach().flatten(1).norm(dim=1)
            )


def test_directions_differ_from_run_to_run_in_their_sizes_only() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(5, 4)]
    direction, second = (filter_normalised_direction(weights, 0, number) for number in (0, 1))
    other = filter_normalised_direction([3 * w.double() for w in weights], 0, 0)
    channels_last = filter_normalised_direction(
        [weights[0].contiguous(memory_format=torch.channels_last), *weights[1:]], 0, 0
    )
    for d, o, c in zip(direction, other, channels_last, strict=True):
        torch.testing.assert_close(3 * d, o.float())
        torch.testing.assert_close(d, c)
    cosine = torch.cosine_similarity(direction[0].flatten(), second[0].flatten(), dim=0)
    assert abs(float(cosine)) < 0.5
    first, alike = filter_normalised_direction([torch.ones(1, 20)] * 2, 0, 0)
    assert abs(float(torch.cosine_similarity(first, alike))) < 0.5


def test_the_line_along_a_filter_normalised_direction_ignores_the_scale_of_a_layer() -> None:
    model = net("relu")
    curves = []
    for factor in (1.0, 10.0):
        rescale(model, factor)
        with frozen(model) as loss:
            # Biases stand still; in the first layer they scale with the weights.
            curves.append(line(loss, filter_normalised_direction(loss.parameters, 0, 0), points=5))
    torch.testing.assert_close(curves[0].losses, curves[1].losses)


def test_between_two_runs_of_a_quadratic_is_a_parabola() -> None:
    with quadratic(MATRIX, MINIMUM, at=FIRST) as loss:
        curve = between(loss, [FIRST], [SECOND], points=5, recompute_statistics=lambda: None)
        assert loss.value()[0] == pytest.approx(value(FIRST))
    assert curve.positions.tolist() == [-0.5, 0.0, 0.5, 1.0, 1.5]
    expected = [value((1 - a) * FIRST + a * SECOND) for a in curve.positions.tolist()]
    assert curve.losses.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["tanh", "convolution"])
def test_between_two_runs_each_point_has_its_own_statistics(name: str) -> None:
    model, other = net(name), net(name)
    batches = batches_of(samples(), 100)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(
                0.3
                * torch.randn(p.shape, generator=torch.Generator().manual_seed(9), dtype=p.dtype)
            )
    before = fingerprint(model)
    with FrozenLoss(model, classification, batches) as loss:
        curve = between(
            loss,
            list(model.parameters()),
            list(other.parameters()),
            points=3,
            low=0.0,
            high=1.0,
            recompute_statistics=lambda: recompute_batchnorm(model, batches),
        )
        stored = loss.value()[0]
    assert fingerprint(model) == before
    for end, place in ((model, 0), (other, 2)):
        end.train()
        for module in end.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        # torch keeps the variance that is not biased, and normalises a batch by the other.
        exact = float(classification(end, samples())[0].detach())
        assert float(curve.losses[place]) == pytest.approx(exact, rel=0.01)
        assert float(curve.losses[place]) != pytest.approx(stored, rel=1e-3)


def test_recomputed_statistics_are_those_of_the_samples_whatever_the_last_batch() -> None:
    inputs, labels = samples()
    found = []
    for size in (100, 50, 49):  # the last leaves batches of 49, 49 and 2
        model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.9)).double()
        model.train()
        before = [module.training for module in model.modules()], model[0].momentum
        recompute_batchnorm(model, batches_of((inputs, labels), size))
        assert ([module.training for module in model.modules()], model[0].momentum) == before
        found.append(model[0])
    for norm in found:
        torch.testing.assert_close(norm.running_mean, inputs.mean(dim=0))
    torch.testing.assert_close(found[0].running_var, inputs.var(dim=0))
    halves = torch.stack([half.var(dim=0) for half in inputs.split(50)])
    torch.testing.assert_close(found[1].running_var, halves.mean(dim=0))


def test_recomputing_leaves_dropout_off_and_a_sample_by_itself_out() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(6)).double().eval()
    inputs, labels = samples()
    recompute_batchnorm(model, batches_of((inputs, labels), 33))  # the last batch has one sample
    torch.testing.assert_close(model[1].running_mean, inputs[:99].mean(dim=0))


def test_a_model_without_batchnorm_is_not_even_run() -> None:
    def fail(model: nn.Module, batch: object) -> None:
        raise AssertionError

    recompute_batchnorm(net("relu"), batches_of(samples(), 50), fail)
    without = nn.BatchNorm1d(6, track_running_stats=False)
    recompute_batchnorm(without, batches_of(samples(), 50), fail)


def test_buffers_come_back_if_a_point_between_fails() -> None:
    model = net("tanh")
    batches = batches_of(samples(), 50)

    def recompute_and_fail() -> None:
        recompute_batchnorm(model, batches)
        raise KeyboardInterrupt

    weights = list(model.parameters())
    with frozen(model) as loss:
        before = fingerprint(model)
        with pytest.raises(KeyboardInterrupt):
            between(loss, weights, weights, points=3, recompute_statistics=recompute_and_fail)
        assert fingerprint(model) == before
        assert math.isfinite(loss.value()[0])
