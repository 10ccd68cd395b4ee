"""`egtrain plot-sharpness`: what it measures is what the numerics give, it repeats nothing, and it
refuses nonsense.
"""

import csv
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Forked, command_line, config_of, forked_ranks, run_here
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

import egtrain
from egtrain.config.files import load_config
from egtrain.errors import UsageError
from egtrain.figures import ENDINGS, new_figure
from egtrain.optim.randomness import generator_for
from egtrain.sharpness import comparison, measure, picture, subjects
from egtrain.sharpness.frozen_loss import FrozenLoss
from egtrain.sharpness.results import (
    Comparison,
    MeasuredCheckpoint,
    MeasuredRun,
    Record,
    RecordStore,
    barrier,
    require_comparable,
)
from egtrain.sharpness.spectrum import eigenvalues, trace

pytestmark = pytest.mark.timeout(120)

SHARP_LABELS = ["task.label_smoothing=0"]
SMALL: dict[str, dict[str, Any]] = {
    "eigenvalues": {"count": 2, "steps": 4},
    "density": {"vectors": 1, "steps": 5},
    "trace": {"samples": 3},
    "line": {"directions": 2, "points": 3, "span": 0.5},
    "plane": {"points": 3, "span": 0.5},
    "average": {"radii": [0.1, 0.2], "samples": 2},
    "worst": {"radii": [0.25, 0.5], "steps": 2, "restarts": 1},
    "epsilon": {"sizes": [1e-3], "iterations": 2},
    "between": {"points": 5},
}
OPTIONS = ["--samples", "24", "--device", "cpu"]


def make_small() -> None:
    """Take few vectors and points, and leave the drawing away, which takes longer than all of
    them.
    """
    measure.METRICS.update({name: (p, p) for name, p in SMALL.items()})
    comparison.minimum_figure = lambda runs: Figure()
    comparison.paths_figure = lambda runs: None
    comparison.training_figure = lambda runs: Figure() if len(runs[0].checkpoints) > 1 else None
    comparison.save_figure = write_dots


def write_dots(figure: Figure | None, path: Path) -> None:
    for ending in ENDINGS:
        path.with_suffix(f".{ending}").write_bytes(bytes(24))


DRAWING = {
    name: getattr(comparison, name)
    for name in ("minimum_figure", "paths_figure", "training_figure", "save_figure")
}


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    before = dict(measure.METRICS)
    make_small()
    yield
    measure.METRICS.update(before)
    vars(comparison).update(DRAWING)


@pytest.fixture(scope="module")
def runs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with finished runs: sgd, eg with another batch, wide with another network,
    one of other data.
    """
    folder = tmp_path_factory.mktemp("runs")
    small = ["model.width=2", "evaluate_every=10", "checkpoint.every=6", "checkpoint.keep=all"]
    run_here(
        folder / "sgd", config_of(images, *small, "log.tensorboard=true", extrapolation="none")
    )
    run_here(folder / "eg", config_of(images, *small, "worker_batch_size=4", "steps=6", "seed=1"))
    run_here(folder / "wide", config_of(images, "model.width=4", "steps=1", "evaluate_every=10"))
    run_here(folder / "elsewhere", config_of(changed_images(images, folder), *small, "steps=1"))
    return folder


def results_in(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "sharpness.json").read_text(encoding="utf-8"))
    return results


def metrics_of(results: dict[str, Any], run: int = 0, checkpoint: int = -1) -> dict[str, Any]:
    metrics: dict[str, Any] = results["runs"][run]["checkpoints"][checkpoint]["metrics"]
    return metrics


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_metric_of_two_runs_is_in_every_output(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vars(comparison).update(DRAWING)
    before = files_in(runs)
    command = [
        "plot-sharpness",
        str(runs / "sgd"),
        str(runs / "eg"),
        *OPTIONS,
        "--output",
        str(tmp_path),
    ]
    first = command_line(capsys, *command, "--label", f"{runs / 'eg'}=with extrapolation")
    assert first.code == 0, first.stderr
    assert "19 measurements to make" in first.stdout
    assert "with extrapolation" in first.stdout
    assert "learning rate" in first.stdout

    results = results_in(tmp_path)
    assert [run["label"] for run in results["runs"]] == ["sgd", "with extrapolation"]
    assert [run["batch_size"] for run in results["runs"]] == [32, 16]
    for number, run in enumerate(results["runs"]):
        (checkpoint,) = run["checkpoints"]
        assert set(checkpoint["metrics"]) == {"level", *SMALL} - {"between"}
        assert ("between" in run) == (number == 1)
        assert checkpoint["metrics"]["trace"]["products"] == 3
    assert metrics_of(results)["density"]["products"] == 0, "it shares the basis of the eigenvalues"

    curves = np.load(tmp_path / "sharpness.npz")
    assert curves["sgd/12/line/losses"].shape == (2, 3)
    assert curves["sgd/12/plane/losses"].shape == (3, 3)
    assert curves["with extrapolation/6/between/losses"].shape == (5,)
    assert curves["sgd/12/line/losses"][0, 1] == pytest.approx(
        metrics_of(results)["level"]["train"]["loss"], rel=1e-6
    )
    rows = list(
        csv.DictReader((tmp_path / "sharpness.csv").read_text(encoding="utf-8").splitlines())
    )
    (row,) = [r for r in rows if (r["run"], r["metric"]) == ("sgd", "trace")]
    assert float(row["value"]) == metrics_of(results)["trace"]["mean"]
    for name in ("sharpness", "sharpness-paths"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert (tmp_path / f"{name}.svg").is_file()
        assert (tmp_path / f"{name}.pdf").is_file()
    assert not (tmp_path / "sharpness-training.png").exists()

    after = files_in(runs)
    new = set(after) - set(before)
    assert new == {"sgd/sharpness/events.out.tfevents.0000000000.sharpness"}, (
        "eg wants no TensorBoard"
    )
    assert {name: after[name] for name in before} == before
    assert events_in(runs / "sgd" / "sharpness")["sharpness/trace"] == {
        12: pytest.approx(metrics_of(results)["trace"]["mean"], rel=1e-6)
    }

    make_small()
    again = command_line(capsys, *command, "--json", "--label", f"{runs / 'eg'}=with extrapolation")
    assert "nothing left to measure, 19 stored already" in again.stderr
    assert json.loads(again.stdout) == results
    assert results_in(tmp_path) == results


def events_in(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    assert events.Tags()["images"] == ["sharpness"]
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_the_numbers_are_those_of_the_weights_and_samples(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*OPTIONS, "--output", str(tmp_path), "--metrics", "eigenvalues,trace"]
    assert command_line(capsys, "plot-sharpness", str(runs / "sgd"), *options).code == 0
    found = metrics_of(results_in(tmp_path))

    run = egtrain.load_run(runs / "sgd")
    order = (
        torch.randperm(run.task.samples, generator=generator_for(0, "sharpness"))[:24].sort().values
    )
    with FrozenLoss(run.model, run.task.loss, run.task.frozen_batches(order)) as loss:
        assert found["level"]["train"]["loss"] == loss.value()[0]
        assert (
            found["eigenvalues"]["largest"] == eigenvalues(loss, count=2, steps=4, seed=0).largest
        )
        assert found["trace"]["mean"] == trace(loss, samples=3, seed=0).mean
    assert found["level"]["test"] == run.evaluate("test")


def test_frozen_batches_are_the_training_images_as_evaluation_sees_them(runs: Path) -> None:
    task = egtrain.load_run(runs / "sgd").task
    indices = torch.arange(0, 150, 2)
    batches = task.frozen_batches(indices)
    assert [size for _, size in batches] == [75]
    (images, labels), _ = batches[0]
    raw, right = task._train[0][indices].permute(0, 3, 1, 2).double() / 255, task._train[1][indices]
    expected = (raw - torch.tensor(task.mean).view(3, 1, 1)) / torch.tensor(task.std).view(3, 1, 1)
    torch.testing.assert_close(images.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(labels, right)


def test_nothing_finished_is_repeated_after_a_failure(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*OPTIONS, "--metrics", "trace,line,plane"]
    command = ["plot-sharpness", str(runs / "sgd"), *options, "--output", str(tmp_path)]
    made: list[str] = []
    original = measure._Bench.measure

    def counting(bench: Any, metric: str, p: Any) -> Any:
        made.append(metric)
        if len(made) == 3:
            raise MemoryError
        return original(bench, metric, p)

    monkeypatch.setattr(measure._Bench, "measure", counting)
    with pytest.raises(MemoryError):
        command_line(capsys, *command)
    assert not (tmp_path / "sharpness.json").exists()
    assert command_line(capsys, *command).code == 0
    assert made == ["level", "trace", "line", "line", "plane"]

    (damaged,) = [
        p for p in (tmp_path / "measured").iterdir() if '"metric": "trace"' in p.read_text()
    ]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:50])
    assert command_line(capsys, *command).code == 0
    assert made[5:] == ["trace"]
    assert (
        json.loads(damaged.read_bytes())["record"]["values"]
        == json.loads(whole)["record"]["values"]
    )

    assert command_line(capsys, *command, "--samples", "23").code == 0
    assert made[6:] == ["level", "trace", "line", "plane"], "other samples are another measurement"


def interrupt_in_third_metric() -> None:
    make_small()
    original, made = measure._Bench.measure, list[str]()

    def interrupted(bench: Any, metric: str, p: Any) -> Any:
        made.append(metric)
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(bench, metric, p)

    measure._Bench.measure = interrupted  # type: ignore[method-assign]


def interrupt_before_anything() -> None:
    comparison.load_subjects = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore[assignment]


def test_an_interrupt_says_what_is_stored(runs: Path, tmp_path: Path) -> None:
    command = [
        "plot-sharpness",
        str(runs / "sgd"),
        *OPTIONS,
        "--output",
        "out",
        "--metrics",
        "trace,line,plane",
    ]
    with Forked(command, tmp_path, before=interrupt_before_anything) as early:
        assert early.wait() == 130
    with Forked(command, tmp_path, before=interrupt_in_third_metric) as process:
        assert process.wait() == 75
        assert process.stderr == (
            "egtrain: interrupted; 2 of 4 measurements are stored in out, and the same command "
            "goes on\n"
        )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".lock", "measured"]
    with Forked(command, tmp_path, before=make_small) as again:
        assert again.wait() == 0, again.stderr
        assert "2 measurements to make, 2 stored already" in again.stdout


def test_two_ranks_give_the_numbers_of_one(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = ["--metrics", "eigenvalues,trace,worst"]
    command = [
        "plot-sharpness",
        str(runs / "sgd"),
        str(runs / "eg"),
        "--device",
        "cpu",
        "--samples",
        "150",
        *metrics,
    ]
    with forked_ranks(
        [*command, "--output", "two"], tmp_path, 2, before=use_small_batches
    ) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], "".join(rank.stderr for rank in ranks)
        assert ranks[1].stdout == ""
    monkeypatch.setattr("egtrain.tasks.image.FROZEN_BATCH", 60)
    assert command_line(capsys, *command, "--output", str(tmp_path / "one")).code == 0
    one, two = results_in(tmp_path / "one"), results_in(tmp_path / "two")
    assert one["sample"] == two["sample"]
    for run in range(2):
        alone, shared = metrics_of(one, run), metrics_of(two, run)
        assert shared["level"]["train"] == pytest.approx(alone["level"]["train"], rel=1e-6)
        assert shared["eigenvalues"]["largest"] == pytest.approx(
            alone["eigenvalues"]["largest"], rel=1e-4
        )
        assert shared["trace"]["mean"] == pytest.approx(alone["trace"]["mean"], rel=1e-4)
        assert shared["worst"]["sharpness"] == pytest.approx(alone["worst"]["sharpness"], rel=1e-3)


def use_small_batches() -> None:
    from egtrain.tasks import image

    make_small()
    image.FROZEN_BATCH = 60


def test_all_checkpoints_give_curves_over_the_steps(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*OPTIONS, "--metrics", "eigenvalues,line"]
    command = ["plot-sharpness", str(runs / "sgd"), *options, "--output", str(tmp_path)]
    assert command_line(capsys, *command, "--checkpoints", "all").code == 0
    (run,) = results_in(tmp_path)["runs"]
    assert [(c["step"], sorted(c["metrics"])) for c in run["checkpoints"]] == [
        (6, ["eigenvalues"]),
        (12, ["eigenvalues", "level", "line"]),
    ]
    assert (tmp_path / "sharpness-training.png").is_file()
    assert list(events_in(runs / "sgd" / "sharpness")["sharpness/lambda_max"]) == [
        6,
        12,
    ]

    file = runs / "sgd" / "checkpoints" / "step-00000006.pt"
    assert command_line(capsys, *command, str(file)).code == 0
    results = results_in(tmp_path)
    assert [run["label"] for run in results["runs"]] == ["sgd", "step-00000006"]
    assert metrics_of(results, 1)["eigenvalues"] == run["checkpoints"][0]["metrics"]["eigenvalues"]
    assert not (tmp_path / "sharpness-training.png").exists(), "a picture of the comparison before"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ["sgd", "--metrics", "eigenvalue"],
            2,
            "unknown metric 'eigenvalue'; did you mean 'eigenvalues'?",
        ),
        (["sgd", "--metrics", "trace,trace"], 2, "names trace twice"),
        (["sgd", "--metrics", ","], 2, "names nothing to measure"),
        (["sgd", "--metrics", "between"], 2, "name a second run"),
        (["sgd", "sgd/../sgd"], 2, "sgd/../sgd is named twice"),
        (
            ["sgd", "--samples", "151"],
            2,
            "--samples 151 is more than the 150 training samples of sgd",
        ),
        (["sgd", "--label", "sg=x"], 2, "--label sg=x is of no run here: write PATH=TEXT"),
        (["sgd", "--label", "sgd="], 2, "has no text"),
        (["sgd", "--label", "sgd=x", "--label", "sgd=y"], 2, "names sgd twice"),
        (["sgd", "eg", "--label", "sgd=eg"], 2, "two runs have the label 'eg'"),
        (["sgd", "--checkpoints", "lats"], 2, "last, best, all, not 'lats'; did you mean 'last'?"),
        (["sgd", "--checkpoints", "best"], 2, "no best checkpoint"),
        (["sgd", "--checkpoints", "all", "--metrics", "line"], 2, "add one of them to --metrics"),
        (["."], 2, "holds no run"),
        (["nowhere"], 2, "nowhere holds no run"),
        (["sgd/checkpoints/step-00000099.pt"], 3, "there is no checkpoint file"),
        (["lonely.pt"], 2, "lonely.pt is a checkpoint without its run"),
        (
            ["sgd", "other"],
            2,
            "sgd and other cannot be compared: their training samples differ (all and 100)",
        ),
        (["sgd", "elsewhere", "--samples", "20"], 2, "their training data differ"),
        (
            ["sgd", "wide", "--metrics", "between", "--samples", "20"],
            2,
            "sgd and wide have different networks",
        ),
        (["sgd", "--device", "tpu"], 2, "device"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str],
    code: int,
    words: str,
    runs: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("sgd", "eg", "wide", "elsewhere"):
        (tmp_path / name).symlink_to(runs / name)
    (tmp_path / "lonely.pt").write_bytes(
        (runs / "sgd" / "checkpoints" / "step-00000006.pt").read_bytes()
    )
    text = (runs / "sgd" / "config.yaml").read_text()
    assert "train_samples: null" in text
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.yaml").write_text(
        text.replace("train_samples: null", "train_samples: 100")
    )
    (tmp_path / "other/checkpoints").symlink_to(runs / "sgd" / "checkpoints")
    if "elsewhere" in arguments:
        # Under one name, so that only the data tell.
        monkeypatch.setattr("egtrain.sharpness.subjects._asked_for", lambda config: {})
    result = command_line(capsys, "plot-sharpness", *arguments)
    assert result.code == code
    assert words in result.line
    assert not list(tmp_path.glob("sharpness/sharpness*"))


def changed_images(images: Path, folder: Path) -> Path:
    arrays = dict(np.load(images))
    arrays["y_train"] = (arrays["y_train"] + 1) % 4
    np.savez(folder / "changed.npz", **arrays)
    return folder / "changed.npz"


def test_runs_of_different_networks_are_compared_without_a_line_between(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "plot-sharpness",
        str(runs / "sgd"),
        str(runs / "wide"),
        *OPTIONS,
        "--output",
        str(tmp_path),
    ]
    assert command_line(capsys, *command).code == 0
    assert "between" not in results_in(tmp_path)["settings"]["metrics"]


def test_a_model_without_second_derivatives_is_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rough(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 2

    def loss(task: Any, model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = Rough.apply(model(batch[0]))
        return outputs.square().mean(), outputs.detach().mean()

    monkeypatch.setattr("egtrain.tasks.image.ImageTask.loss", loss)
    options = [*OPTIONS, "--output", str(tmp_path), "--metrics", "trace"]
    result = command_line(capsys, "plot-sharpness", str(runs / "sgd"), *options)
    assert result.code == 2
    assert "no second derivatives" in result.line


def measured_run(number: int, label: str, loss: float = 0.01, checkpoints: int = 1) -> MeasuredRun:
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
        "trace": Record({"mean": 7 * sharpness, "standard_error": 9.0}),
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
    return MeasuredRun(
        label=label,
        directory=f"runs/{number}",
        batch_size=256 * 2 ** (number // 2),
        seed=0,
        metric="accuracy",
        checkpoints=tuple(
            MeasuredCheckpoint(100 * step, "", "", records) for step in range(1, checkpoints + 1)
        ),
        between=Record({"barrier": 1.0}, path) if number else None,
    )


@pytest.mark.parametrize(("count", "length"), [(1, 3), (2, 10), (8, 120)])
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
    for figure in (
        picture.minimum_figure(runs),
        picture.paths_figure(runs),
        picture.training_figure(runs),
    ):
        assert figure is not None
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


def test_only_what_was_measured_has_a_panel() -> None:
    run = measured_run(0, "run")
    only = {name: run.records[name] for name in ("level", "trace")}
    run = MeasuredRun("run", "", 256, 0, "accuracy", (MeasuredCheckpoint(1, "", "", only),))
    assert [axes.get_title() for axes in picture.minimum_figure([run]).axes] == ["Trace"]
    assert picture.paths_figure([run]) is None
    assert picture.training_figure([run]) is None
    assert len(new_figure(1, 1)[1]) == 1


def test_unequal_training_losses_and_loose_eigenvalues_are_warned_of() -> None:
    def warnings(*runs: MeasuredRun) -> list[str]:
        return Comparison({}, {}, runs).warnings

    assert warnings(measured_run(0, "a", 0.100), measured_run(1, "b", 0.109)) == []
    (warning,) = warnings(measured_run(0, "a", 0.100), measured_run(1, "b", 0.112))
    assert "more than 10%" in warning
    (warning,) = warnings(measured_run(7, "h"))
    assert "eigenvalues of h have not converged" in warning
    assert warning.endswith("use --thorough")
    (warning,) = Comparison({"thorough": True}, {}, (measured_run(7, "h"),)).warnings
    assert "use --thorough" not in warning


def test_a_label_finds_its_run_however_the_path_is_written(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    labels = [f"{tmp_path}//run/=one", f"{tmp_path}/./a=b=two = 2"]
    assert subjects._given_labels([tmp_path / "run", odd], labels) == {
        tmp_path / "run": "one",
        odd: "two = 2",
    }


def test_runs_that_smooth_their_labels_differently_are_not_compared() -> None:
    own, other = (
        subjects._asked_for(load_config("transformer-eg", change)) for change in ([], SHARP_LABELS)
    )
    with pytest.raises(UsageError, match="label smoothing"):
        require_comparable(("own", own), ("other", other))


def test_a_perplexity_is_that_of_the_mean_loss() -> None:
    loss = SimpleNamespace(value=lambda: (2.0, 99.0))
    task = SimpleNamespace(training_metric=SimpleNamespace(name="perplexity"))
    bench = measure._Bench(loss, task, None, [], None)  # type: ignore[arg-type]
    assert bench.measure("level", {})[0] == {"train": {"loss": 2.0, "perplexity": math.exp(2.0)}}


def test_the_barrier_is_the_rise_above_the_straight_line() -> None:
    assert barrier([-0.5, 0.0, 0.5, 1.0, 1.5], [9.0, 1.0, 5.0, 3.0, 9.0]) == 3.0
    assert barrier([0.0, 0.5, 1.0], [1.0, 1.5, 3.0]) == 0.0


def test_a_record_is_found_by_everything_that_it_depends_on(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "measured")
    key = {"metric": "trace", "parameters": {"samples": 3}, "checkpoint": "abc"}
    record = Record(
        {"mean": 1 / 3, "standard_error": float("nan")},
        {"samples": [1.0, 2.0]},
        products=3,
        seconds=0.5,
    )
    store.put(key, record)
    found = store.get(key)
    assert found is not None
    assert found.values["mean"] == 1 / 3
    assert store.get({**key, "parameters": {"samples": 4}}) is None
    assert store.get({**key, "checkpoint": "abd"}) is None
