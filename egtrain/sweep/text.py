"""Numbers in words, the same in tables, lines and pictures."""

from egtrain.progress import FRACTIONS


def metric_text(name: str, value: float | None, *, signed: bool = False) -> str:
    """Return a value of a metric: fractions in percent, others with four significant digits; a dash
    for None.
    """
    if value is None:
        return "–"
    sign = "+" if signed else ""
    return (
        f"{value * 100:{sign}.2f}" + " %" * (not signed)
        if name in FRACTIONS
        else f"{value:{sign}.4g}"
    )


def target_text(name: str, value: float) -> str:
    """Return a value of a metric in the digits that it was given with."""
    return f"{value * 100:.4g} %" if name in FRACTIONS else f"{value:.4g}"


def mean_text(name: str, mean: float | None, deviation: float | None) -> str:
    """Return mean ± standard deviation of a metric; the mean alone where there is one seed."""
    if mean is None or deviation is None:
        return metric_text(name, mean)
    if name in FRACTIONS:
        return f"{mean * 100:.2f} ± {deviation * 100:.2f} %"
    return f"{mean:.4g} ± {deviation:.2g}"


def short_count(number: float) -> str:
    """Return a large number in short, such as `1.5M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
