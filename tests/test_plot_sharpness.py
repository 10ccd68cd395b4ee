"""`egtrain plot-sharpness`: what it measures is what the numerics give, it repeats nothing, and it
refuses nonsense.
"""

import csv
import dataclasses
import json
import math
import os
import signal
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Forked, command_line, config_of, forked_ranks, run_here
from matplotlib.figure import Figure

import egtrain
import egtrain.sharpness
from egtrain.cli import app
from egtrain.config.files import load_config
from egtrain.errors import UsageError
from egtrain.figures import ENDINGS
from egtrain.optim.randomness import generator_for
from egtrain.sharpness import comparison, measuring, metrics
from egtrain.sharpness.frozen_loss import FrozenLoss
from egtrain.sharpness.measuring import Job
from egtrain.sharpness.metrics import METRICS, level, metric_of
from egtrain.sharpness.metrics.between import barrier
from egtrain.sharpness.records import Record, RecordStore
from egtrain.sharpness.runs import Comparison, Run, given_labels
from egtrain.sharpness.sample import comparable_settings, require_comparable
from egtrain.sharpness.spectrum import eigenvalues, trace
from egtrain.tasks.language import LanguageTask

pytestmark = pytest.mark.timeout(120)

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
    """Take few vectors and points, and leave out the drawing, which takes longer than all of
    them.
    """
    for name, parameters in SMALL.items():
        replace_metric(name, default=parameters, thorough=parameters)
    comparison.draw_pictures = few_pictures
    comparison.save_figure = write_dots


def replace_metric(name: str, **changes: Any) -> None:
    module: Any = import_module(f"egtrain.sharpness.metrics.{name}")
    module.METRIC = dataclasses.replace(module.METRIC, **changes)


def few_pictures(found: Comparison) -> dict[str, Figure]:
    further = ["sharpness-training"] if len(found.runs[0].checkpoints) > 1 else []
    return {name: Figure() for name in ["sharpness", *further]}


def write_dots(figure: Figure | None, path: Path) -> None:
    for ending in ENDINGS:
        path.with_suffix(f".{ending}").write_bytes(bytes(24))


DRAWING = {name: getattr(comparison, name) for name in ("draw_pictures", "save_figure")}


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    before = {name: vars(metric_of(name)) for name in METRICS}
    make_small()
    yield
    for name, fields in before.items():
        replace_metric(name, **fields)
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


def plotting(*runs: Path, output: Path | str, metrics: str | None = None) -> list[str]:
    """Return a command line that measures runs over few samples."""
    chosen = [] if metrics is None else ["--metrics", metrics]
    return ["plot-sharpness", *map(str, runs), *OPTIONS, "--output", str(output), *chosen]


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
    command = plotting(runs / "sgd", runs / "eg", output=tmp_path)
    first = command_line(capsys, *command, "--label", f"{runs / 'eg'}=with extrapolation")
    assert first.code == 0, first.stderr
    assert "19 measurements to make" in first.stdout
    assert "with extrapolation" in first.stdout
    (last,) = [line for line in first.stdout.splitlines() if line.startswith("see ")]
    assert "see sharpness.png, sharpness-paths.png, sharpness.json, " in last
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
    (events,) = new  # eg wants no TensorBoard
    assert events.startswith("sgd/sharpness/events.out.tfevents.")
    assert {name: after[name] for name in before} == before
    assert events_in(runs / "sgd" / "sharpness")["sharpness/trace"] == {
        12: pytest.approx(metrics_of(results)["trace"]["mean"], rel=1e-6)
    }

    make_small()
    again = command_line(capsys, *command, "--json", "--label", f"{runs / 'eg'}=with extrapolation")
    assert "nothing left to measure, 19 stored already" in again.stderr
    assert json.loads(again.stdout) == results
    assert results_in(tmp_path) == results
    assert len(list((runs / "sgd" / "sharpness").iterdir())) == 1


def events_in(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    assert "sharpness" in events.Tags()["images"]
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_the_numbers_are_those_of_the_weights_and_samples(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = plotting(runs / "sgd", output=tmp_path, metrics="eigenvalues,trace")
    assert command_line(capsys, *command).code == 0
    found = metrics_of(results_in(tmp_path))

    run = egtrain.load_run(runs / "sgd")
    order = (
        torch.randperm(run.task.samples, generator=generator_for(0, "sharpness"))[:24].sort().values
    )
    with FrozenLoss(run.model, run.task.loss, run.task.frozen_batches(order)) as loss:
        assert found["level"]["train"]["loss"] == loss.value()[0]
        assert found["eigenvalues"]["largest"] == eigenvalues(loss, count=2, steps=4, seed=0).values
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
    command = plotting(runs / "sgd", output=tmp_path, metrics="trace,line,plane")
    made: list[str] = []
    original = measuring.measure

    def counting(model: Any, job: Job, *further: Any) -> Record:
        made.append(job.metric)
        if len(made) == 3:
            raise MemoryError
        return original(model, job, *further)

    monkeypatch.setattr(measuring, "measure", counting)
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

    fewer = ["23" if argument == "24" else argument for argument in command]
    assert command_line(capsys, *fewer).code == 0
    assert made[6:] == ["level", "trace", "line", "plane"], "other samples are another measurement"


def interrupt_in_third_metric() -> None:
    make_small()
    original, made = measuring.measure, list[str]()

    def interrupted(model: Any, job: Job, *further: Any) -> Record:
        made.append(job.metric)
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(model, job, *further)

    measuring.measure = interrupted


def interrupt_before_anything() -> None:
    comparison.load = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore[assignment]


def test_an_interrupt_says_what_is_stored(runs: Path, tmp_path: Path) -> None:
    command = plotting(runs / "sgd", output="out", metrics="trace,line,plane")
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
    command = plotting(runs / "sgd", output=tmp_path, metrics="eigenvalues,line")
    result = command_line(capsys, *command, "--checkpoints", "all")
    assert result.code == 0
    (run,) = results_in(tmp_path)["runs"]
    assert [(c["step"], sorted(c["metrics"])) for c in run["checkpoints"]] == [
        (6, ["eigenvalues"]),
        (12, ["eigenvalues", "level", "line"]),
    ]
    assert (tmp_path / "sharpness-training.png").is_file()
    assert "see sharpness.png, sharpness-training.png, sharpness.json, " in result.stdout
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
        (["sgd", "--label", "sg=x"], 2, "--label sg=x belongs to no run: write PATH=TEXT"),
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
        monkeypatch.setattr("egtrain.sharpness.sample.comparable_settings", lambda config: {})
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
    command = plotting(runs / "sgd", runs / "wide", output=tmp_path)
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
    command = plotting(runs / "sgd", output=tmp_path, metrics="trace")
    result = command_line(capsys, *command)
    assert result.code == 2
    assert "no second derivatives" in result.line


def test_a_label_finds_its_run_however_the_path_is_written(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    labels = [f"{tmp_path}//run/=one", f"{tmp_path}/./a=b=two = 2"]
    assert given_labels([tmp_path / "run", odd], labels) == {
        tmp_path / "run": "one",
        odd: "two = 2",
    }


@pytest.mark.parametrize(
    ("preset", "change", "words"),
    [
        ("transformer-eg", "task.label_smoothing=0", "label smoothing"),
        ("lstm-eg", "task.bptt=7", "window lengths"),
    ],
)
def test_runs_with_different_losses_or_samples_are_not_compared(
    preset: str, change: str, words: str
) -> None:
    configs = [load_config(preset, changes) for changes in ([], [change])]
    compared = [Run("run", Path("run"), config, []) for config in configs]
    with pytest.raises(UsageError, match=words):
        require_comparable(compared, [comparable_settings(config) for config in configs])


def test_every_file_of_a_metric_has_a_row_and_every_public_name_is_there() -> None:
    files = {path.stem for path in Path(metrics.__file__).parent.glob("*.py")}
    assert files - {"__init__", "level"} == set(METRICS)
    for name in egtrain.sharpness.__all__:
        assert callable(getattr(egtrain.sharpness, name))


def test_a_perplexity_is_that_of_the_mean_loss() -> None:
    loss = SimpleNamespace(value=lambda: (2.0, 99.0))
    model: Any = SimpleNamespace(loss=loss, task=LanguageTask, test=None)
    assert level.measure(model)[0] == {"train": {"loss": 2.0, "perplexity": math.exp(2.0)}}


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


def test_torchrun_is_given_every_option_but_nproc_which_it_would_take_for_one_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(
        "egtrain.ranks.launch.launch", lambda ranks, arguments: started.append(arguments) or 0
    )
    options = ["--metrics", "trace", "--label", "a=b c", "--offline", "--json", "--thorough"]
    command = ["plot-sharpness", "a", *options, "--nproc", "2"]
    monkeypatch.setattr("sys.argv", ["egtrain", *command])
    with pytest.raises(SystemExit):
        app(command)
    (arguments,) = started
    assert "--nproc" not in arguments
    assert arguments[:2] == ["plot-sharpness", "a"]
    assert set(options) <= set(arguments)
