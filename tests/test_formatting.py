"""Every number has one text."""

import math

import pytest

from egtrain.formatting import (
    FRACTION,
    counted,
    difference_text,
    difference_unit,
    duration,
    estimate_text,
    learning_rate_text,
    mean_text,
    number,
    percent,
    short_count,
    short_value_text,
    size_text,
    value_text,
)
from egtrain.tasks import ACCURACY, LOSS, Metric, metrics_text


def test_percent_has_two_decimals_and_a_space() -> None:
    assert percent(0.712) == value_text(0.712, FRACTION) == "71.20 %"
    assert percent(1) == "100.00 %"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((2.0, "2.000"), (0.51234, "0.5123"), (89.5567, "89.56"), (0.0, "0.000")),
        *((999.96, "1000"), (1234.5, "1,234"), (33278.4, "33,278"), (-5.0, "-5.000")),
        *((1.5e-7, "1.500e-07"), (math.nan, "nan"), (math.inf, "inf")),
    ],
)
def test_other_numbers_have_four_digits_and_large_ones_are_whole(value: float, text: str) -> None:
    assert number(value) == value_text(value, "nats") == text


def test_limits_and_targets_have_no_trailing_zeros() -> None:
    assert short_value_text(0.91, FRACTION) == "91 %"
    assert short_value_text(0.625, FRACTION) == "62.5 %"
    assert short_value_text(30.1) == "30.1"
    assert learning_rate_text(0.1 * 0.32) == "0.032"


def test_differences_of_fractions_are_points() -> None:
    assert difference_text(-0.0125, FRACTION) == "-1.25"
    assert difference_text(1.5, "BLEU") == "+1.5"
    assert (difference_unit(FRACTION), difference_unit("BLEU")) == ("points", "BLEU")


def test_an_estimate_has_the_digits_that_its_error_leaves() -> None:
    assert estimate_text(1011.4, 71.2) == "1,011 ± 71"
    assert estimate_text(-0.0009473, 0.006) == "-0.0009 ± 0.0060"
    assert estimate_text(32.21, 6.21) == "32.2 ± 6.2"
    assert estimate_text(2.5, 0.0) == estimate_text(2.5, math.nan) == "2.500"


def test_a_mean_stands_with_its_deviation_where_there_is_one() -> None:
    assert mean_text(0.712, 0.0035, FRACTION) == "71.20 ± 0.35 %"
    assert mean_text(23.4, 0.25) == "23.40 ± 0.25"
    assert mean_text(0.712, None, FRACTION) == "71.20 %"


def test_what_is_not_there_is_a_dash() -> None:
    assert value_text(None) == short_value_text(None) == difference_text(None) == "–"
    assert mean_text(None, None) == "–"


def test_counts_sizes_and_durations() -> None:
    assert counted(1, "step") == "1 step"
    assert counted(2000, "step") == "2,000 steps"
    assert [short_count(n) for n in (512, 1500, 2.5e6, 3e9)] == ["512", "1.5k", "2.5M", "3G"]
    assert [size_text(n) for n in (512, 2048, 170_498_071, 3 << 30)] == [
        "512 bytes",
        "2.0 KiB",
        "162.6 MiB",
        "3.0 GiB",
    ]
    assert [duration(s) for s in (0.4, 125, 90_061)] == ["0:00:00", "0:02:05", "25:01:01"]


def test_metrics_are_told_in_the_order_of_their_worth_with_what_is_possible() -> None:
    values = {"loss": 0.9, "accuracy": 0.712, "other": 1.0}
    assert metrics_text(values, [ACCURACY, LOSS]) == "accuracy 71.20 %, loss 0.9000"
    assert (
        metrics_text(values, [ACCURACY, LOSS], best_possible=0.91)
        == "accuracy 71.20 % of at best 91 %, loss 0.9000"
    )
    perplexity = Metric("perplexity", "", higher_is_better=False)
    assert metrics_text({"perplexity": 45.678}, [perplexity], 8.6) == (
        "perplexity 45.68 of at best 8.6"
    )
    token_accuracy = Metric("token_accuracy", FRACTION, higher_is_better=True)
    assert metrics_text({"token_accuracy": 0.5}, [token_accuracy]) == "token accuracy 50.00 %"
