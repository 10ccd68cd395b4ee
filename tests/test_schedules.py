"""Learning-rate schedules at their ends and corners."""

import math

import pytest

from egtrain.optim.schedules import (
    Schedule,
    constant,
    cosine_decay,
    inverse_sqrt,
    step_decay,
    with_warmup,
)


def test_a_constant_is_the_same_everywhere() -> None:
    assert {constant(0.3)(step) for step in (0, 1, 10_000)} == {0.3}


@pytest.mark.parametrize(
    "schedule",
    [constant(0.8), step_decay(0.8, [50], 0.1), cosine_decay(0.8, 10, 100)],
    ids=["constant", "step", "cosine"],
)
def test_warmup_goes_in_a_straight_line_from_its_start_to_the_schedule(schedule: Schedule) -> None:
    rate = with_warmup(schedule, steps=10, start=0.1)
    assert rate(0) == 0.1
    assert rate(5) == pytest.approx(0.45)
    assert [rate(s + 1) - rate(s) for s in range(10)] == pytest.approx([0.07] * 10)
    assert rate(10) == 0.8
    assert [rate(s) for s in range(10, 100)] == [schedule(s) for s in range(10, 100)]


def test_no_warmup_is_the_schedule() -> None:
    rate = with_warmup(step_decay(0.8, [1], 0.1), steps=0, start=0.1)
    assert [rate(0), rate(1)] == [0.8, pytest.approx(0.08)]


def test_a_warmup_never_comes_from_above() -> None:
    rate = with_warmup(constant(0.1), steps=5, start=0.4)
    assert [rate(step) for step in range(8)] == [0.1] * 8


def test_warmup_aims_at_the_rate_that_follows_it() -> None:
    rate = with_warmup(step_decay(0.8, [4], 0.5), steps=6, start=0.0)
    assert rate(6) == 0.4
    assert max(rate(step) for step in range(20)) == 0.4


def test_step_decay_changes_at_its_milestones() -> None:
    rate = step_decay(1.6, [150, 225], 0.1)
    assert rate(0) == rate(149) == 1.6
    assert rate(150) == rate(224) == pytest.approx(0.16)
    assert rate(225) == rate(10_000) == pytest.approx(0.016)


def test_step_decay_without_milestones_is_constant() -> None:
    assert step_decay(1.6, [], 0.1)(10_000) == 1.6


def test_cosine_decay_ends_and_middle() -> None:
    rate = cosine_decay(0.8, first=20, last=120)
    assert rate(0) == rate(20) == 0.8
    assert rate(45) == pytest.approx(0.4 * (1 + math.sqrt(0.5)))
    assert rate(70) == pytest.approx(0.4)
    assert rate(120) == pytest.approx(0.0, abs=1e-16)
    assert rate(10_000) == pytest.approx(0.0, abs=1e-16)
    assert all(rate(step + 1) < rate(step) for step in range(20, 120))


def test_a_cosine_of_no_length_does_not_divide_by_zero() -> None:
    rate = cosine_decay(0.8, first=5, last=5)
    assert rate(5) == 0.8
    assert rate(6) == pytest.approx(0.0, abs=1e-16)


def test_the_inverse_square_root_falls_from_the_end_of_the_warm_up_on() -> None:
    """Vaswani et al. 2017: in proportion to the step, then to its inverse root, and the peak
    between them.
    """
    schedule = with_warmup(inverse_sqrt(0.8, 100), 100, 0.0)
    assert [schedule(step) for step in (0, 50, 100, 400, 10_000)] == pytest.approx(
        [0.0, 0.4, 0.8, 0.4, 0.08]
    )
    assert max(map(schedule, range(1000))) == schedule(100) == 0.8


def test_the_inverse_square_root_without_a_warm_up_begins_at_its_peak() -> None:
    schedule = inverse_sqrt(0.8, 0)
    assert [schedule(step) for step in (0, 1, 4)] == pytest.approx([0.8, 0.8, 0.4])
