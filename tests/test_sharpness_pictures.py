"""The pictures and the table of a comparison: every text can be read, and nothing is drawn in
vain.
"""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.cells import cell_len

from egtrain.config.files import load_config
from egtrain.sharpness.metrics import METRICS
from egtrain.sharpness.picture import draw_pictures
from egtrain.sharpness.records import Record
from egtrain.sharpness.report import tables_of
from egtrain.sharpness.results import warnings_of
from egtrain.sharpness.runs import Checkpoint, Comparison, Run
from egtrain.tables import table_lines
from egtrain.tasks import ACCURACY


def measured_run(number: int, label: str, loss: float = 0.01, checkpoints: int = 1) -> Run:
    """Return a run with made-up values of every metric."""
    sharpness = 20.0 * 1.5 ** (number % 5)
    positions = np.linspace(-1, 1, 9)
    bowl = positions**2 * (1 + number / 4)
    records = {
        "level": Record(
            {"train": {"loss": loss, "accuracy": 0.99}, "test": {"loss": 0.4, "accuracy": 0.9}}
        ),
        "eigenvalues": Record(
            {
                "largest": [sharpness],
                "residuals": [0.0],
                "converged": [number != 7],
                "smallest": -1.0,
            }
            | {"smallest_residual": 0.0, "smallest_converged": True}
        ),
        "trace": Record({"mean": 7 * sharpness, "standard_error": 9.0}, {"samples": [0.0] * 3}),
        "density": Record(
            {}, {"nodes": [[-1.0, 0.0, 1.0, sharpness]], "weights": [[1e-4, 0.9, 0.0998, 1e-4]]}
        ),
        "line": Record({}, {"positions": positions, "losses": np.stack([bowl, 2 * bowl]) + loss}),
        "plane": Record({}, {"positions": positions, "losses": bowl[:, None] + bowl + loss}),
        "average": Record(
            {"radii": [0.05, 0.1, 0.2], "mean": [-0.1, 0.2, 0.5], "standard_error": [0.2, 0.1, 0.1]}
        ),
        "worst": Record(
            {"radii": [0.25, 0.5, 1.0], "sharpness": [sharpness, 2 * sharpness, 4 * sharpness]}
        ),
        "epsilon": Record({"sizes": [1e-3, 5e-4], "sharpness": [2 * sharpness, sharpness]}),
    }
    path = {"positions": [-0.5, 0.0, 0.5, 1.0, 1.5], "losses": [2.0, 0.01, 1.0 + number, 0.01, 3.0]}
    if number:
        records["between"] = Record({"barrier": 1.0}, path)
    config = load_config("resnet-eg", [f"seed={number % 2}", f"workers={2 ** (number // 2)}"])
    steps = [100 * step for step in range(1, checkpoints + 1)]
    found = [Checkpoint(Path("file"), step, records) for step in steps]
    return Run(label, Path("runs"), config, found, (ACCURACY, ACCURACY))


@pytest.mark.parametrize(("count", "length"), [(1, 3), (2, 10), (3, 10), (5, 30), (8, 120)])
def test_no_text_of_a_picture_overlaps_another_or_leaves_it(
    count: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Text] = []
    draw = Text.draw
    monkeypatch.setattr(
        Text, "draw", lambda text, renderer: (drawn.append(text), draw(text, renderer))
    )
    runs = [
        measured_run(n, f"run {n} {'with a label ' * 10}"[:length].strip(), checkpoints=3)
        for n in range(count)
    ]
    pictures = draw_pictures(comparison_of(runs))
    expected = {"sharpness", "sharpness-paths", "sharpness-training"}
    assert set(pictures) == (expected if count > 1 else expected - {"sharpness-paths"})
    for figure in pictures.values():
        assert len(figure.legends) == 1
        canvas = FigureCanvasAgg(figure)
        canvas.draw()  # the layout
        drawn.clear()
        canvas.draw()
        width, height = canvas.get_width_height()
        seen = [text for text in drawn if text.get_visible() and text.get_text().strip()]
        boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in seen]
        assert len(boxes) > 10
        for number, (text, box) in enumerate(boxes):
            assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -1, f"{text!r} is cut off"
            for other, other_box in boxes[:number]:
                assert not box.overlaps(other_box.shrunk(0.9, 0.9)), f"{text!r} overlaps {other!r}"


def comparison_of(runs: list[Run], *metrics: str) -> Comparison:
    settings = {name: {} for name in metrics or METRICS if name != "between" or len(runs) > 1}
    return Comparison({"metrics": settings}, {"size": 1024}, runs)


def panels_of(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_only_what_was_measured_has_a_panel() -> None:
    runs = [measured_run(n, f"run {n}") for n in range(2)]
    (figure,) = draw_pictures(comparison_of(runs, "trace")).values()
    assert panels_of(figure) == ["Trace"]


def test_a_single_run_has_no_panel_with_one_dot() -> None:
    run = measured_run(0, "run")
    (figure,) = draw_pictures(comparison_of([run])).values()
    assert panels_of(figure) == [
        "Spectrum of the Hessian",
        "Loss along 2 random directions",
        "Run 1, random plane",
        "Average",
        "Worst",
    ]
    assert draw_pictures(comparison_of([run], "eigenvalues", "trace", "epsilon")) == {}


def test_a_title_tells_model_data_samples_seeds_and_what_the_errors_are() -> None:
    runs = [measured_run(n, f"run {n}") for n in range(3)]
    title = draw_pictures(comparison_of(runs))["sharpness"].get_suptitle().replace("\n", " ")
    assert "3 runs of resnet (depth 20, width 16) on cifar10, 2 seeds (0, 1)" in title
    assert "over 1,024 training samples" in title
    assert "standard error over 3 random vectors (trace)" in title
    assert "range over the 2 directions (bands)" in title


@pytest.mark.parametrize("count", [2, 3, 5])
def test_contour_planes_are_large_and_share_one_colour_bar(count: int) -> None:
    runs = [measured_run(n, f"run {n}") for n in range(count)]
    figure = draw_pictures(comparison_of(runs))["sharpness"]
    FigureCanvasAgg(figure).draw()
    planes = [axes for axes in figure.axes if axes.get_title().endswith("random plane")]
    assert len(planes) == count
    for plane in planes:
        assert plane.get_position().width * figure.get_figwidth() > 1.5, "inches"
    (bar,) = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    ticks = [float(text.get_text()) for text in bar.get_yticklabels()]
    assert ticks == [0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0][-len(ticks) :]
    assert len(ticks) > 5


def test_accuracies_over_the_largest_eigenvalue_have_ticks_that_can_be_told_apart() -> None:
    runs = [measured_run(n, f"run {n}") for n in range(2)]
    for run, accuracy in zip(runs, (0.352, 0.361), strict=True):
        run.records["level"].values["test"]["accuracy"] = accuracy
    figure = draw_pictures(comparison_of(runs, "eigenvalues"))["sharpness"]
    FigureCanvasAgg(figure).draw()
    (axes,) = [axes for axes in figure.axes if axes.get_title().startswith("Test accuracy")]
    assert isinstance(axes, Axes)
    low, high = axes.get_ylim()
    shown = [
        (place, text.get_text())
        for place, text in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
        if low <= place <= high
    ]
    assert len(shown) > 3
    for place, text in shown:
        assert float(text.removesuffix(" %")) == pytest.approx(100 * place, abs=1e-9)


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_table_holds_every_result_in_the_width_of_the_terminal(count: int, width: int) -> None:
    names = [f"resnet-eg-2026112{n}-060000" for n in range(count)]
    runs = [measured_run(n, name) for n, name in enumerate(names)]
    lines = [line for table in tables_of(runs, width) for line in table_lines(table, width)]
    assert max(map(cell_len, lines)) <= width
    text = "\n".join(lines)
    whole = "\n".join(table_lines(*tables_of(runs, None), None))
    for word in whole.split():
        if word not in names:
            assert text.split().count(word) >= whole.split().count(word), f"{word!r} is missing"
    for name in names:
        assert all(part in text for part in name.split("-"))
    assert "(no room for" not in text
    assert all("±" in line for line in lines if line.startswith("trace")), "values beside names"


def test_unequal_training_losses_and_loose_eigenvalues_are_warned_of() -> None:
    def warnings(*runs: Run) -> list[str]:
        return warnings_of(Comparison({}, {}, runs))

    assert warnings(measured_run(0, "a", 0.100), measured_run(1, "b", 0.109)) == []
    (warning,) = warnings(measured_run(0, "a", 0.100), measured_run(1, "b", 0.112))
    assert "more than 10 %" in warning
    (warning,) = warnings(measured_run(7, "h"))
    assert "eigenvalues of h have not converged" in warning
    assert warning.endswith("use --thorough")
    (warning,) = warnings_of(Comparison({"thorough": True}, {}, [measured_run(7, "h")]))
    assert "use --thorough" not in warning
