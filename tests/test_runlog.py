import io
import json
import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import config_of, run_here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata

from egtrain.errors import EgtrainError
from egtrain.logs import runlog
from egtrain.logs.environment import versions
from egtrain.logs.runlog import RunLog, write_summary
from egtrain.logs.training_display import TrainingDisplay

STEPS_PER_EPOCH = 4


def log_steps(log: RunLog, first: int, last: int) -> None:
    """Log a run whose metrics are a function of the step."""
    for step in range(first, last + 1):
        epoch = step / STEPS_PER_EPOCH
        log.train_step(
            step, epoch, {"loss": 1 / step, "accuracy": step / 100, "learning_rate": 0.1}
        )
        if step % STEPS_PER_EPOCH == 0:
            log.evaluation(step, epoch, "test", {"loss": 2 / step, "accuracy": step / 200})


def lines_in(directory: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line, parse_constant=pytest.fail)
        for line in (directory / "metrics.jsonl").read_text().splitlines()
    ]


def without_wall(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "wall"} for line in lines]


def events_in(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def curve(directory: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events_in(directory).Scalars(tag)]


def event_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("events.out.tfevents.*"))


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Let the operating system refuse to write larger files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- metrics.jsonl


def test_a_line_is_one_object_with_the_clock_under_one_key(tmp_path: Path) -> None:
    with RunLog(tmp_path, batch_size=8, tensorboard=False) as log:
        log.train_step(1, 0.25, {"loss": 2.5, "noise_scale": math.inf})
        log.evaluation(1, 0.25, "validation", {"loss": math.nan, "accuracy": 0.5})
    train, validation = lines_in(tmp_path)
    assert train.pop("wall").keys() == {"seconds", "samples_per_second"}
    assert validation.pop("wall").keys() == {"seconds"}
    assert train == {"step": 1, "epoch": 0.25, "split": "train", "loss": 2.5, "noise_scale": None}
    assert validation == {
        "step": 1,
        "epoch": 0.25,
        "split": "validation",
        "loss": None,
        "accuracy": 0.5,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_can_be_read_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with RunLog(tmp_path, batch_size=8, tensorboard=False) as log:
        log_steps(log, 1, 3)
        assert [line["step"] for line in lines_in(tmp_path)] == [1, 2, 3]


def test_only_each_so_many_th_step_is_written_where_that_was_asked_for(tmp_path: Path) -> None:
    with RunLog(tmp_path, batch_size=8, every=3) as log:
        log_steps(log, 1, 9)
    lines = lines_in(tmp_path)
    assert [line["step"] for line in lines if line["split"] == "train"] == [3, 6, 9]
    assert [line["step"] for line in lines if line["split"] == "test"] == [4, 8]
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [3, 6, 9]


def test_the_speed_counts_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    log = RunLog(tmp_path, batch_size=100, tensorboard=False)
    for step in range(1, 101):
        # The first step holds the start-up; from step 51 on, they take twice as long.
        now += 60.0 if step == 1 else 0.5 if step <= 50 else 1.0
        log.train_step(step, 0, {})
        if step == 30:
            now += 1000.0
            log.evaluation(step, 0, "test", {})
        if step == 40:
            now += 1000.0
            log.restart_clock()
    speeds = [
        line["wall"]["samples_per_second"]
        for line in lines_in(tmp_path)
        if line["split"] == "train"
    ]
    assert speeds[0] is None
    assert speeds[1:50] == [200.0] * 49
    assert 100 < speeds[60] < 200
    assert speeds[70:] == [100.0] * 30
    log.close()


def test_the_speed_is_known_also_where_each_step_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with RunLog(tmp_path, batch_size=100, tensorboard=False) as log:
        for step in (1, 2):
            now += 0.5
            log.train_step(step, 0, {})
            now += 9.0
            log.evaluation(step, 0, "test", {})
    assert [line["wall"].get("samples_per_second") for line in lines_in(tmp_path)] == [
        None,
        None,
        200.0,
        None,
    ]


# ---- resumed


@pytest.mark.parametrize("resume_step", [1, 4, 6, 8, 10])
def test_a_resumed_run_leaves_the_log_of_an_undisturbed_one(
    tmp_path: Path, resume_step: int
) -> None:
    undisturbed, disturbed = tmp_path / "a", tmp_path / "b"
    undisturbed.mkdir()
    disturbed.mkdir()
    with RunLog(undisturbed, batch_size=8) as log:
        log.text("config", "the config")
        log_steps(log, 1, 12)
        log.hyperparameters({"lr": 0.1}, {"test_accuracy": 0.06})
    with RunLog(disturbed, batch_size=8) as log:
        log.text("config", "the config")
        log_steps(log, 1, 10)
    # What a kill in mid-write leaves, in both kinds of file.
    with (disturbed / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "epoch": 1.2')
    torn = event_files(undisturbed)[0].read_bytes()[-200:]
    with event_files(disturbed)[0].open("ab") as file:
        file.write(torn[:150])
    for _ in range(2):
        with RunLog(disturbed, batch_size=8, resume_step=resume_step) as log:
            log.text("config", "the config")
            log_steps(log, resume_step + 1, 12)
            log.hyperparameters({"lr": 0.1}, {"test_accuracy": 0.06})
    assert without_wall(lines_in(disturbed)) == without_wall(lines_in(undisturbed))
    tags = events_in(undisturbed).Tags()
    assert {
        key: sorted(value)
        for key, value in events_in(disturbed).Tags().items()
        if isinstance(value, list)
    } == {key: sorted(value) for key, value in tags.items() if isinstance(value, list)}
    for tag in tags["scalars"]:
        if not tag.startswith("speed/"):
            assert curve(disturbed, tag) == curve(undisturbed, tag), tag
    assert [step for step, _ in curve(disturbed, "train/loss")] == list(range(1, 13))
    assert [event.step for event in events_in(disturbed).Tensors("config")] == [0]


def test_a_reader_that_knows_nothing_of_restarts_finds_each_step_once(tmp_path: Path) -> None:
    with RunLog(tmp_path, batch_size=8) as log:
        log_steps(log, 1, 10)
    for resume_step in (8, 3):
        with RunLog(tmp_path, batch_size=8, resume_step=resume_step) as log:
            log_steps(log, resume_step + 1, 10)
    assert len(event_files(tmp_path)) == 3
    naive = EventAccumulator(str(tmp_path), purge_orphaned_data=False)
    naive.Reload()
    assert [event.step for event in naive.Scalars("train/loss")] == list(range(1, 11))


def test_a_tensorboard_that_has_read_what_was_cut_off_forgets_it(tmp_path: Path) -> None:
    with RunLog(tmp_path, batch_size=8) as log:
        log_steps(log, 1, 10)
    watching = events_in(tmp_path)
    assert len(watching.Scalars("train/loss")) == 10
    with RunLog(tmp_path, batch_size=8, resume_step=6) as log:
        log_steps(log, 7, 12)
    watching.Reload()
    assert [event.step for event in watching.Scalars("train/loss")] == list(range(1, 13))


def test_a_run_resumed_after_its_end_changes_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path, batch_size=8) as log:
        log_steps(log, 1, 8)
        log.hyperparameters({"lr": 0.1}, {"test_accuracy": 0.04})
    before = lines_in(tmp_path)
    with RunLog(tmp_path, batch_size=8, resume_step=8) as log:
        log.hyperparameters({"lr": 0.1}, {"test_accuracy": 0.04})
    assert lines_in(tmp_path) == before
    assert [step for step, _ in curve(tmp_path, "final/test_accuracy")] == [8]
    assert len(curve(tmp_path, "train/loss")) == 8


@pytest.mark.parametrize("resume_step", [None, 0])
def test_a_run_that_starts_again_starts_an_empty_log(
    tmp_path: Path, resume_step: int | None
) -> None:
    with RunLog(tmp_path, batch_size=8) as log:
        log.text("config", "old")
        log_steps(log, 1, 5)
    with RunLog(tmp_path, batch_size=8, resume_step=resume_step) as log:
        log.text("config", "new")
        log_steps(log, 1, 2)
    assert [line["step"] for line in lines_in(tmp_path)] == [1, 2]
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [1, 2]
    (text,) = events_in(tmp_path).Tensors("config")
    assert text.tensor_proto.string_val == [b"new"]


def test_lines_around_a_damaged_one_are_kept(tmp_path: Path) -> None:
    with RunLog(tmp_path, batch_size=8, tensorboard=False) as log:
        log_steps(log, 1, 3)
    path = tmp_path / "metrics.jsonl"
    first, _, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\x00" * 40 + b"\n" + b"[1]\n" + b'{"step": "x"}\n' + third.rstrip())
    with RunLog(tmp_path, batch_size=8, tensorboard=False, resume_step=3) as log:
        log_steps(log, 4, 4)
    assert [line["step"] for line in lines_in(tmp_path)] == [1, 3, 4, 4]


def test_the_clock_goes_on_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with RunLog(tmp_path, batch_size=8, tensorboard=False) as log:
        for step in (1, 2, 3):
            now += 10
            log.train_step(step, 0, {})
    now = 77.0
    with RunLog(tmp_path, batch_size=8, tensorboard=False, resume_step=2) as log:
        now += 10
        log.train_step(3, 0, {})
    assert [line["wall"]["seconds"] for line in lines_in(tmp_path)] == [10, 20, 30]


# ---- TensorBoard


def test_curves_are_named_by_what_they_show_over_the_step(tmp_path: Path) -> None:
    metrics = {
        "loss": 1.0,
        "accuracy": 0.5,
        **{name: 2.0 for name in runlog.TAGS if name != "samples_per_second"},
    }
    with RunLog(tmp_path, batch_size=8) as log:
        for step in (1, 2):
            log.train_step(step, 0.1, metrics)
        log.evaluation(2, 0.2, "test", {"accuracy": 0.25})
    assert set(events_in(tmp_path).Tags()["scalars"]) == {
        "train/loss",
        "train/accuracy",
        "test/accuracy",
    } | set(runlog.TAGS.values())
    assert curve(tmp_path, "test/accuracy") == [(2, 0.25)]
    assert curve(tmp_path, "gradient/noise_scale") == [(1, 2.0), (2, 2.0)]


def test_hyperparameters_land_in_the_run_itself(tmp_path: Path) -> None:
    with RunLog(tmp_path, batch_size=8) as log:
        log_steps(log, 1, 4)
        log.hyperparameters(
            {
                "optimizer.lr": 0.1,
                "workers": 16,
                "compile": False,
                "model": "resnet",
                "steps": None,
                "m": (0.5, 1),
            },
            {"test_accuracy": 0.5},
        )
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["over_samples"]
    events = events_in(tmp_path)
    content = events.PluginTagToContent("hparams")[hparams_metadata.SESSION_START_INFO_TAG]
    found = hparams_metadata.parse_session_start_info_plugin_data(content).hparams
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()} == {
        "optimizer.lr": 0.1,
        "workers": 16.0,
        "compile": False,
        "model": "resnet",
        "m": "(0.5, 1)",
    }
    assert curve(tmp_path, "final/test_accuracy") == [(4, 0.5)]


def test_files_of_one_second_are_read_in_the_order_in_which_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000_000_000.0)
    for first in range(1, 14):
        with RunLog(tmp_path, batch_size=8, resume_step=first - 1) as log:
            log_steps(log, first, first)
    assert [step for step, _ in curve(tmp_path, "train/loss")] == list(range(1, 14))


def table_of_hyperparameters(runs: Path) -> tuple[dict[str, int], list[str], dict[str, float]]:
    """Return what TensorBoard's table would show: the type of each hyperparameter, the metrics in
    their order, and the first metric of each run.
    """
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, get_experiment, list_session_groups
    from tensorboard.plugins.hparams.backend_context import Context

    found = EventMultiplexer()
    found.AddRunsFromDirectory(str(runs))
    found.Reload()
    provider = MultiplexerDataProvider(found, str(runs))
    context = Context(TBContext(logdir=str(runs), data_provider=provider))
    experiment = get_experiment.Handler(
        RequestContext(), context, "", api_pb2.GetExperimentRequest()
    ).run()
    request = api_pb2.ListSessionGroupsRequest(
        slice_size=100, allowed_statuses=[api_pb2.STATUS_UNKNOWN]
    )
    request.col_params.add(metric=experiment.metric_infos[0].name)
    rows = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
    return (
        {info.name: info.type for info in experiment.hparam_infos},
        [info.name.tag for info in experiment.metric_infos],
        {row.sessions[0].name: row.metric_values[0].value for row in rows},
    )


def test_the_table_of_hyperparameters_shows_numbers_and_final_metrics(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import api_pb2

    final = [f"{s}/{m}" for s in ("test", "validation") for m in ("accuracy", "loss")]
    for name, rate in (("a", 0.5), ("b", 0.25)):
        (tmp_path / name).mkdir()
        with RunLog(tmp_path / name, batch_size=8) as log:
            log.train_step(1, 1, {"loss": 1.0, **dict.fromkeys(runlog.TAGS, 2.0)})
            log.evaluation(1, 1, "test", {"loss": 1.0, "accuracy": rate})
            log.hyperparameters(
                {"learning_rate": rate, "batch_size": 2048, "data.name": "cifar10"},
                dict.fromkeys(final, rate),
            )
    types, metrics, first_metric = table_of_hyperparameters(tmp_path)
    assert types == {
        "learning_rate": api_pb2.DATA_TYPE_FLOAT64,
        "batch_size": api_pb2.DATA_TYPE_FLOAT64,
        "data.name": api_pb2.DATA_TYPE_STRING,
    }
    # TensorBoard shows five at first.
    assert metrics[:4] == [f"final/{name}" for name in final]
    assert first_metric == {"a": 0.5, "b": 0.25}


def test_a_run_puts_its_settings_batch_size_and_peak_rate_into_the_table(
    images: Path, tmp_path: Path
) -> None:
    config = config_of(
        images,
        "log.tensorboard=true",
        "optimizer.base_batch_size=16",
        "optimizer.lr_scaling=linear",
    )
    run_here(tmp_path / "runs/one", config)
    content = events_in(tmp_path / "runs/one").PluginTagToContent("hparams")
    found = hparams_metadata.parse_session_start_info_plugin_data(
        content[hparams_metadata.SESSION_START_INFO_TAG]
    ).hparams
    assert found["batch_size"].number_value == config.batch_size != 16
    peak = config.optimizer.scaled_lr(config.batch_size)
    assert found["learning_rate"].number_value == peak != config.optimizer.lr
    for name in ("workers", "worker_batch_size", "optimizer.lr", "optimizer.momentum", "seed"):
        assert found[name].WhichOneof("kind") == "number_value", name
    assert found["data.name"].WhichOneof("kind") == "string_value"
    _, metrics, _ = table_of_hyperparameters(tmp_path / "runs")
    assert metrics[:2] == ["final/test/accuracy", "final/test/loss"]


def test_a_run_in_the_current_directory_has_the_name_of_that_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    with RunLog(Path(), batch_size=8) as log:
        log_steps(log, 1, 1)
        log.hyperparameters({"lr": 0.1}, {"test_accuracy": 0.04})
    content = events_in(tmp_path / "one").PluginTagToContent("hparams")
    found = hparams_metadata.parse_session_start_info_plugin_data(
        content[hparams_metadata.SESSION_START_INFO_TAG]
    )
    assert found.group_name == "one"


def test_a_run_is_named_by_its_directory_alone(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

    (tmp_path / "resnet-eg").mkdir()
    with RunLog(tmp_path / "resnet-eg", batch_size=8) as log:
        log_steps(log, 1, 4)
    found = EventMultiplexer()
    found.AddRunsFromDirectory(str(tmp_path))
    assert set(found.Runs()) == {"resnet-eg", "resnet-eg/over_samples"}


@pytest.mark.parametrize("resume_step", [0, 4, 6])
def test_curves_over_samples_hold_each_step_once_after_a_resume(
    tmp_path: Path, resume_step: int
) -> None:
    with RunLog(tmp_path, batch_size=8) as log:
        log_steps(log, 1, 8)
    watching = events_in(tmp_path / "over_samples")
    with RunLog(tmp_path, batch_size=8, resume_step=resume_step) as log:
        log_steps(log, resume_step + 1, 12)
    if resume_step:
        watching.Reload()
    else:
        watching = events_in(tmp_path / "over_samples")
    assert set(watching.Tags()["scalars"]) == {
        f"over_samples/{name}" for name in ("train_loss", "test_loss", "test_accuracy")
    }
    steps = [event.step for event in watching.Scalars("over_samples/train_loss")]
    assert steps == [8 * step for step in range(1, 13)]
    found = {event.step: event.value for event in watching.Scalars("over_samples/test_accuracy")}
    assert found == pytest.approx({32: 0.02, 64: 0.04, 96: 0.06})


# ---- full disks


def test_a_full_disk_is_warned_of_once_and_loses_nothing_once_there_is_room(tmp_path: Path) -> None:
    warnings: list[str] = []
    log = RunLog(tmp_path, batch_size=8, warn=warnings.append)
    log_steps(log, 1, 3)
    # In the middle of a record, for both files.
    with files_limited_to((tmp_path / "metrics.jsonl").stat().st_size + 10):
        log_steps(log, 4, 40)
        log.flush()
    assert len(warnings) == 3
    assert sum("metrics.jsonl" in warning for warning in warnings) == 1
    assert sum("tfevents" in warning for warning in warnings) == 2
    assert all("training goes on" in warning for warning in warnings)
    log_steps(log, 41, 44)
    log.close()
    assert [line["step"] for line in lines_in(tmp_path) if line["split"] == "train"] == list(
        range(1, 45)
    )
    assert [step for step, _ in curve(tmp_path, "train/loss")] == list(range(1, 45))
    assert len(warnings) == 3


def test_a_run_that_ends_on_a_full_disk_can_be_resumed(tmp_path: Path) -> None:
    warnings: list[str] = []
    log = RunLog(tmp_path, batch_size=8, warn=warnings.append)
    log_steps(log, 1, 3)
    with files_limited_to((tmp_path / "metrics.jsonl").stat().st_size + 10):
        log_steps(log, 4, 40)
        log.close()
    with RunLog(tmp_path, batch_size=8, resume_step=3) as log:
        log_steps(log, 4, 6)
    assert [line["step"] for line in lines_in(tmp_path) if line["split"] == "train"] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_a_log_that_cannot_be_opened_is_an_error_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "over_samples").write_text("in the way")
    with pytest.raises(EgtrainError, match=r"cannot write .*over_samples"):
        RunLog(tmp_path, batch_size=8)
    with pytest.raises(EgtrainError, match=r"cannot write .*missing"):
        RunLog(tmp_path / "missing", batch_size=8)


def test_by_default_a_warning_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path, batch_size=8, tensorboard=False) as log:
        log._warn("no room")
    display = TrainingDisplay("x", epochs=1, steps=1, stream=stream)
    with RunLog(tmp_path, batch_size=8, tensorboard=False, display=display) as log:
        log._warn("no room")
    assert capsys.readouterr().err == "warning: no room\n"
    assert stream.getvalue() == "warning: no room\n"


def test_the_log_tells_the_display(tmp_path: Path) -> None:
    stream = io.StringIO()
    with (
        TrainingDisplay("x", epochs=2, steps=8, stream=stream, seconds_between_lines=0) as display,
        RunLog(tmp_path, batch_size=8, tensorboard=False, every=100, display=display) as log,
    ):
        log_steps(log, 1, 8)
    assert len(stream.getvalue().splitlines()) == 2 + 8 + 2
    assert "samples/s" in stream.getvalue()


# ---- the summary


def test_a_summary_is_json_also_with_numbers_that_json_lacks(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(
        path, {"final": {"loss": math.nan}, "rows": [1, math.inf], "versions": versions()}
    )
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert found["final"] == {"loss": None}
    assert found["rows"] == [1, None]
    assert found["versions"].keys() == {"egtrain", "python", "torch", "cuda", "numpy", "platform"}
