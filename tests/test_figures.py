"""Pictures: every file that is promised, the same bytes each time, and ticks that tell values
apart.
"""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg

from egtrain.figures import ENDINGS, new_figure, save_figure, show_percent, write_title

DRAW = """
import sys
from pathlib import Path
from egtrain.figures import new_figure, save_figure, write_title
figure, (axes,) = new_figure(1, 1)
axes.plot([1, 2], label="λ")
axes.legend()
write_title(figure, "a title")
save_figure(figure, Path(sys.argv[1]))
"""


def test_a_figure_is_written_as_png_svg_and_pdf_with_the_same_bytes_on_every_day(
    tmp_path: Path,
) -> None:
    for name, day in (("one", "1000000000"), ("two", "1700000000")):
        environment = {**os.environ, "SOURCE_DATE_EPOCH": day, "PYTHONHASHSEED": day[:4]}
        environment["PYTHONPATH"] = str(ROOT)
        subprocess.run(
            [sys.executable, "-c", DRAW, str(tmp_path / name)], env=environment, check=True
        )
    for ending, first in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        one, two = ((tmp_path / f"{name}.{ending}").read_bytes() for name in ("one", "two"))
        assert one.startswith(first)
        assert one == two, f"the {ending} knows when it was made"
    assert {p.suffix for p in tmp_path.iterdir()} == {f".{ending}" for ending in ENDINGS}


def test_a_png_has_300_dots_an_inch(tmp_path: Path) -> None:
    figure, _ = new_figure(1, 2, width=2.0, height=1.5)
    save_figure(figure, tmp_path / "a")
    assert struct.unpack(">II", (tmp_path / "a.png").read_bytes()[16:24]) == (1200, 450)


def test_a_title_leaves_the_panels_their_height() -> None:
    heights = []
    for sentences in ([], ["a title"], ["a title", "and a long note " * 10]):
        figure, (axes,) = new_figure(1, 1)
        if sentences:
            write_title(figure, *sentences)
        FigureCanvasAgg(figure).draw()
        heights.append(axes.get_position().height * figure.get_figheight())
    assert heights == pytest.approx(heights[:1] * 3, abs=0.1)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.32, 0.38, ["32.5 %", "35 %", "37.5 %"]), (0.2, 0.9, ["20 %", "40 %", "60 %", "80 %"])],
)
def test_ticks_in_percent_have_the_decimals_that_they_need(
    low: float, high: float, expected: list[str]
) -> None:
    figure, (axes,) = new_figure(1, 1)
    axes.set_ylim(low, high)
    axes.set_yticks([float(text[:-2]) / 100 for text in expected])
    show_percent(axes.yaxis)
    FigureCanvasAgg(figure).draw()
    assert [tick.get_text() for tick in axes.get_yticklabels()] == expected
