"""What the pictures share: colours for colour-blind eyes and greyscale, titles, whole files."""

import io
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from egtrain.disk import write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#666666")
"""One per run or preset, after Okabe and Ito; markers and line styles differ as well."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2, 1, 2)))

STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "figure.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "egtrain",
    "pdf.fonttype": 42,  # TrueType; many journals refuse the default
}
DOTS_PER_INCH = 300
"""Of a PNG."""
WITHOUT_DATES: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
"""Metadata left out of each kind of file, so that equal figures give equal bytes."""
ENDINGS = tuple(WITHOUT_DATES)
"""Of the files of a figure."""
CHARACTERS_PER_INCH, LINE_HEIGHT = 12, 0.2
"""Of a title; the height is in inches."""


def new_figure(
    rows: int, columns: int, width: float = 4.0, height: float = 3.2
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, row by row; a panel's `width` and `height` are in inches."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def write_title(figure: Figure, *sentences: str) -> None:
    """Write sentences above the panels, each on a new line; the panels keep their height."""
    width, height = figure.get_size_inches()
    lines = [
        line
        for sentence in sentences
        for line in textwrap.wrap(sentence, int(width * CHARACTERS_PER_INCH))
    ]
    figure.set_size_inches(width, height + LINE_HEIGHT * len(lines))
    with mpl.rc_context(STYLE):
        figure.suptitle("\n".join(lines))


def show_percent(axis: Axis) -> None:
    """Show the ticks of an axis of fractions in percent, with the decimals they need."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g} %"))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, SVG and PDF, `path` with each ending; equal figures, equal bytes.

    Raises:
        EgtrainError: the files could not be written.
    """
    for ending, metadata in WITHOUT_DATES.items():
        content = io.BytesIO()
        with mpl.rc_context(STYLE):
            figure.savefig(content, format=ending, dpi=DOTS_PER_INCH, metadata=metadata)
        write_atomically(path.with_suffix(f".{ending}"), content.getvalue())
