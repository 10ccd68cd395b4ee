"""What the pictures share: colours that survive colour blindness and greyscale, and files that are
written whole.
"""

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from egtrain.checkpoint import write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#666666")
"""One a run or preset, after Okabe and Ito; markers and line styles tell them apart without
colour."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2, 1, 2)))

STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "egtrain",
}


def new_figure(
    rows: int, columns: int, width: float = 4.0, height: float = 3.2
) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels and its axes, row by row; `width` and `height` are a panel's, in
    inches.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and SVG, `path` with either ending; the same figure gives the same
    bytes.

    Raises:
        EgtrainError: the files could not be written.
    """
    for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        content = io.BytesIO()
        with mpl.rc_context(STYLE):
            figure.savefig(content, format=ending, dpi=150, metadata=metadata)
        write_atomically(path.with_suffix(f".{ending}"), content.getvalue())
