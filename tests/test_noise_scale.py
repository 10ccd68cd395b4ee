"""The gradient noise scale on gradients whose noise is known."""

import numpy as np
import pytest

from egtrain.optim import NoiseScale

WORKERS, SAMPLES, DIMENSIONS = 4, 8, 50
TRUE_SQUARED_GRADIENT, TRUE_TRACE = 2.0, 30.0


def norms(steps: int, seed: int, workers: int = WORKERS) -> list[tuple[float, float]]:
    """Return mean_k‖g^k‖² and ‖ḡ‖² of Gaussian gradients, each the mean of so many samples, for
    some steps.
    """
    random = np.random.default_rng(seed)
    deviation = np.sqrt(TRUE_TRACE / DIMENSIONS / SAMPLES)
    gradients = deviation * random.standard_normal((steps, workers, DIMENSIONS))
    gradients += np.sqrt(TRUE_SQUARED_GRADIENT / DIMENSIONS)
    local = np.square(gradients).sum(axis=2).mean(axis=1)
    return list(
        zip(local.tolist(), np.square(gradients.mean(axis=1)).sum(axis=1).tolist(), strict=True)
    )


def one_step_estimates(workers: int) -> tuple[np.ndarray, np.ndarray]:
    estimates = []
    for local, mean in norms(20_000, seed=1, workers=workers):
        scale = NoiseScale(decay=0.0)
        scale.update(local, mean, workers, SAMPLES)
        estimates.append((scale.squared_gradient, scale.noise_trace))
    squared_gradient, trace = np.array(estimates).T
    return squared_gradient, trace


@pytest.mark.parametrize("workers", [2, 4])
def test_the_one_step_estimates_are_unbiased(workers: int) -> None:
    for estimates, truth in zip(
        one_step_estimates(workers), (TRUE_SQUARED_GRADIENT, TRUE_TRACE), strict=True
    ):
        error = estimates.std() / np.sqrt(len(estimates))
        assert error < 0.01 * truth
        assert abs(estimates.mean() - truth) < 4 * error


def test_the_averages_are_taken_before_the_ratio() -> None:
    scale = NoiseScale(decay=0.999)
    for local, mean in norms(10_000, seed=2):
        scale.update(local, mean, WORKERS, SAMPLES)
    assert scale.value == pytest.approx(TRUE_TRACE / TRUE_SQUARED_GRADIENT, rel=0.05)
    squared_gradient, trace = one_step_estimates(WORKERS)
    assert np.mean(trace / squared_gradient) != pytest.approx(
        TRUE_TRACE / TRUE_SQUARED_GRADIENT, rel=0.05
    )


def test_the_averages_forget_at_the_rate_of_their_decay() -> None:
    scale = NoiseScale(decay=0.75)
    scale.update(7.0, 4.0, workers=4, samples=8)
    # |G|² = (32·4 − 8·7)/(32 − 8) = 3 and S = (7 − 4)/(1/8 − 1/32) = 32.
    assert (scale.squared_gradient, scale.noise_trace) == pytest.approx((0.25 * 3, 0.25 * 32))
    # The first estimate is a ratio of sums that start at zero alike: no correction is needed.
    assert scale.value == pytest.approx(32 / 3)
    scale.update(0.0, 0.0, workers=4, samples=8)
    assert (scale.squared_gradient, scale.noise_trace) == pytest.approx(
        (0.75 * 0.25 * 3, 0.75 * 0.25 * 32)
    )


def test_one_worker_shows_nothing() -> None:
    scale = NoiseScale()
    for _ in range(3):
        scale.update(2.0, 2.0, workers=1, samples=8)
    assert scale.value is None
    assert scale == NoiseScale()


def test_nothing_is_shown_before_the_first_step_or_without_a_gradient() -> None:
    assert NoiseScale().value is None
    scale = NoiseScale()
    scale.update(5.0, 1.0, workers=4, samples=8)
    assert scale.squared_gradient < 0
    assert scale.value is None


def test_the_state_is_everything() -> None:
    scale = NoiseScale(decay=0.9)
    for local, mean in norms(20, seed=3):
        scale.update(local, mean, WORKERS, SAMPLES)
    restored = NoiseScale(**scale.state_dict())
    assert restored == scale
    for local, mean in norms(5, seed=4):
        scale.update(local, mean, WORKERS, SAMPLES)
        restored.update(local, mean, WORKERS, SAMPLES)
    assert restored.value == scale.value
