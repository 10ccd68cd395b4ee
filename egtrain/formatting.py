"""The text of every number: percent, counts, sizes and durations are each written in one way."""

import math

FRACTION = "fraction"
"""The unit of numbers from 0 to 1 that people read in percent."""
NOTHING = "–"
"""Stands for a missing number."""


def value_text(value: float | None, unit: str = "") -> str:
    """Return a value: a fraction as `71.20 %`, others with four significant digits.

    Args:
        value: None gives a dash.
        unit: `FRACTION`, or any other, which is left out.
    """
    if value is None:
        return NOTHING
    return percent(value) if unit == FRACTION else number(value)


def short_value_text(value: float | None, unit: str = "") -> str:
    """Return a value without trailing zeros, such as `91 %`: for targets, limits and axes."""
    if value is None:
        return NOTHING
    return f"{value * 100:.4g} %" if unit == FRACTION else f"{value:.4g}"


def difference_text(difference: float | None, unit: str = "") -> str:
    """Return a difference with its sign; of fractions, in percentage points: `-1.25`."""
    if difference is None:
        return NOTHING
    return f"{difference * 100:+.2f}" if unit == FRACTION else f"{difference:+.4g}"


def difference_unit(unit: str) -> str:
    """Return the unit of differences, for a title: `points` where the values are fractions."""
    return "points" if unit == FRACTION else unit


def mean_text(mean: float | None, deviation: float | None, unit: str = "") -> str:
    """Return `mean ± deviation`, such as `71.20 ± 0.35 %`; the mean alone without a deviation."""
    if mean is None or deviation is None:
        return value_text(mean, unit)
    if unit == FRACTION:
        return f"{mean * 100:.2f} ± {percent(deviation)}"
    return f"{number(mean)} ± {deviation:.2g}"


def estimate_text(value: float, standard_error: float) -> str:
    """Return `value ± standard error` with the digits that the error allows: `1,011 ± 71`."""
    if not (math.isfinite(standard_error) and standard_error > 0):
        return number(value)
    decimals = max(0, 1 - math.floor(math.log10(standard_error)))
    return f"{value:,.{decimals}f} ± {standard_error:,.{decimals}f}"


def percent(fraction: float, decimals: int = 2) -> str:
    """Return a fraction in percent, such as `71.20 %`."""
    return f"{fraction * 100:.{decimals}f} %"


def number(value: float) -> str:
    """Return a number with four significant digits, or a large one whole: `2.000`, `33,278`."""
    if not math.isfinite(value):
        return f"{value}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}".removesuffix(".")


def count(amount: float | None) -> str:
    """Return a whole number, such as `50,000`."""
    return NOTHING if amount is None else f"{amount:,.0f}"


def counted(amount: int, noun: str) -> str:
    """Return a number of things, such as `1 step` or `2,000 steps`."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def short_count(amount: float) -> str:
    """Return a large number in short form, such as `1.5M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= size:
            return f"{amount / size:.3g}{unit}"
    return f"{amount:.3g}"


def size_text(size: float) -> str:
    """Return a number of bytes, such as `162.6 MiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def learning_rate_text(rate: float) -> str:
    """Return a learning rate, or a factor, without trailing zeros, such as `0.032`."""
    return f"{rate:.4g}"


def duration(seconds: float) -> str:
    """Return a time span as hours, minutes and seconds, such as `0:02:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
