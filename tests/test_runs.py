"""`egtrain runs`: what a run leaves to be read, and the table of runs."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, tzinfo
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    Forked,
    Result,
    arguments,
    command_line,
    config_of,
    environment,
    run_here,
    wait_until,
)
from rich.console import Console

from egtrain.config.files import load_config
from egtrain.config.schema import config_to_yaml
from egtrain.config.yaml_text import read_settings, read_written_settings
from egtrain.errors import DivergedError, UsageError
from egtrain.run_directory import RunLock
from egtrain.runs.finding import run_folders
from egtrain.runs.grouping import Line, grouped
from egtrain.runs.reading import Evaluation, Run, State, read_run
from egtrain.runs.report import print_lines
from egtrain.tasks.image import ImageTask

Command = Callable[..., Result]


@pytest.fixture
def egtrain_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Return a function that runs a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *command: command_line(capsys, *command)


def write_run(
    directory: Path,
    *overrides: str,
    preset: str = "quickstart",
    steps: int = 100,
    accuracy: float | None = 0.5,
    best: float | None = None,
    started: float = 0.0,
) -> Path:
    """Write what a run leaves that is done, without its checkpoints."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(config_text(preset, *overrides))
    os.utime(directory / "config.yaml", (started, started))
    metric = {"name": "accuracy", "unit": "fraction", "higher_is_better": True}
    (directory / "plan.json").write_text(json.dumps({"steps": steps, "metric": metric}))
    (directory / ".lock").write_text("1\n")
    write_metrics(directory, (steps, "train", 0.1), (steps, "test", accuracy))
    summary = {
        "metric": metric,
        "final": {"test": {"loss": 1.5, "accuracy": accuracy}},
        "best": None if best is None else {"step": 50, "validation": {"accuracy": best}},
        "steps": steps,
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


@cache
def config_text(preset: str, *overrides: str) -> str:
    return config_to_yaml(load_config(preset, list(overrides)))


def write_metrics(directory: Path, *lines: tuple[int, str, float | None]) -> None:
    """Write metrics.jsonl: the step, split and accuracy of each line."""
    text = [
        json.dumps(
            {"step": s, "epoch": s / 10, "split": split, "loss": 1.0, "accuracy": a}
            | {"wall": {"seconds": s / 10}}
        )
        for s, split, a in lines
    ]
    (directory / "metrics.jsonl").write_text("".join(f"{line}\n" for line in text))


def unfinished(
    directory: Path,
    *lines: tuple[int, str, float | None],
    overrides: tuple[str, ...] = (),
    **options: Any,
) -> Path:
    """Write what a run leaves that was stopped."""
    write_run(directory, *overrides, **options)
    (directory / "summary.json").unlink()
    write_metrics(directory, *lines)
    return directory


def read(*folders: Path) -> list[Run]:
    found = run_folders(folders, [])
    return [run for folder in found if (run := read_run(folder)) is not None]


def lines_of(folder: Path, *, each: bool = False) -> list[Line]:
    return grouped(read(folder), each=each)


def table(folder: Path, width: int | None = None, *, each: bool = False) -> list[str]:
    """Return the lines printed to a file, or to a terminal of this width."""
    written = io.StringIO()
    terminal = {"force_terminal": True, "width": width} if width else {}
    console = Console(file=written, highlight=False, color_system=None, **terminal)  # type: ignore[arg-type]
    print_lines(lines_of(folder, each=each), console)
    return written.getvalue().splitlines()


# ---- where runs go


@pytest.mark.parametrize(
    ("options", "variable", "folder"),
    [
        ([], None, "runs/quickstart"),
        (["--name", "my run"], None, "runs/my run"),
        (["--output-root", "a/b"], None, "a/b/quickstart"),
        ([], "/tmp/elsewhere", "/tmp/elsewhere/quickstart"),
        ([], "", "runs/quickstart"),
        (["--output-root", "a", "--name", "x"], "/tmp/elsewhere", "a/x"),
    ],
)
def test_a_run_goes_into_the_folder_and_has_the_name_that_are_asked_for(
    options: list[str],
    variable: str | None,
    folder: str,
    egtrain_command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if variable is not None:
        monkeypatch.setenv("EGTRAIN_RUNS", variable)
    planned: list[Path] = []
    monkeypatch.setattr("egtrain.dry_run.print_plan", lambda _, path, *__: planned.append(path))
    assert egtrain_command("train", "--preset", "quickstart", "--dry-run", *options).code == 0
    assert re.fullmatch(rf"{folder}-\d{{8}}-\d{{6}}", str(planned[0]))


def test_a_sweep_goes_into_the_folder_that_is_asked_for(
    egtrain_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = ["sweep-batch", "--preset", "quickstart", "--batch-sizes", "32", "--dry-run", "--json"]
    for options, variable, folder in (
        ([], "", "runs"),
        ([], "from/variable", "from/variable"),
        (["--output-root", "given"], "from/variable", "given"),
    ):
        monkeypatch.setenv("EGTRAIN_RUNS", variable)
        plan = json.loads(egtrain_command(*sweep, *options).stdout)
        (command,) = plan["commands"].values()
        assert f"--output {folder}/sweep-quickstart/cells/" in command
    both = egtrain_command(*sweep, "--output", "here", "--output-root", "there")
    assert (both.code, both.line) == (
        2,
        "--output names the folder itself: leave out --output-root",
    )


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "x" * 201, "bell\a"])
def test_a_name_that_is_none_is_refused(name: str, egtrain_command: Command) -> None:
    result = egtrain_command("train", "--preset", "quickstart", "--name", name)
    assert (result.code, result.stdout) == (2, "")
    assert result.line.startswith("--name takes at most 200 printable characters without '/'")


@pytest.mark.parametrize(
    "option", [["--name", "x"], ["--output-root", "x"]], ids=["name", "output-root"]
)
def test_a_directory_by_itself_has_no_other_name_or_root(
    option: list[str], egtrain_command: Command
) -> None:
    for which in ("--output", "--resume"):
        preset = ["--preset", "quickstart"] if which == "--output" else []
        result = egtrain_command("train", which, "run", *preset, *option)
        assert (result.code, result.line) == (
            2,
            f"{which} names the run directory itself: leave out --name and --output-root",
        )


def test_runs_that_start_in_the_same_second_do_not_meet(
    images: Path, egtrain_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noon(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Noon":
            return cls(2026, 1, 1, 12)

    # Not by its name, which is that of the command in the package.
    monkeypatch.setattr(import_module("egtrain.cli.train"), "datetime", Noon)
    for further in ([], [], ["--nproc", "2"]):
        assert egtrain_command(*arguments(images, "steps=1"), *further).code == 0
    names = [f"quickstart-20260101-120000{end}" for end in ("", "-2", "-3")]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == names
    for name in names:
        assert json.loads((tmp_path / "runs" / name / "summary.json").read_text())["name"] == name


# ---- what a run leaves to be read


def test_the_summary_says_what_counts_and_which_way_is_better(images: Path, tmp_path: Path) -> None:
    run_here(tmp_path / "run", config_of(images, "steps=2"))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["metric"] == {"name": "accuracy", "unit": "fraction", "higher_is_better": True}


def test_a_run_notes_how_it_failed_until_it_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, note = tmp_path / "run", tmp_path / "run/failure.json"
    with pytest.raises(DivergedError):
        run_here(run, config_of(images, "optimizer.lr=1e30", extrapolation="none"))
    diverged = json.loads(note.read_text())
    assert diverged["exit_code"] == 4
    assert diverged["message"].startswith("the loss of worker 0 became nan at step ")

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("no memory\n\nis left")

    with monkeypatch.context() as patch:
        patch.setattr("egtrain.train.take_step", out_of_memory)
        with pytest.raises(RuntimeError):
            run_here(run, config_of(images, extrapolation="none"), resume=True)
    assert json.loads(note.read_text()) == {
        "exit_code": 1,
        "message": "RuntimeError: no memory is left",
    }

    run_here(run, config_of(images, extrapolation="none"), resume=True)
    assert not note.exists()
    assert (run / "summary.json").exists()
    plan = json.loads((run / "plan.json").read_text())
    assert plan == {"steps": 12, "metric": json.loads((run / "summary.json").read_text())["metric"]}


# ---- finding and reading


def test_runs_are_found_however_deep_and_once(tmp_path: Path) -> None:
    for place in ("a", "sweep/cells/b", "a/inner"):
        write_run(tmp_path / "runs" / place)
    for hidden in ("a/checkpoints/c", "a/over_samples/d", ".trash/e"):
        write_run(tmp_path / "runs" / hidden)
    write_run(tmp_path / "elsewhere/f")
    write_run(tmp_path / "elsewhere/f/inner")
    (tmp_path / "runs/link").symlink_to(tmp_path / "elsewhere/f")
    (tmp_path / "runs/links").symlink_to(tmp_path)
    (tmp_path / "runs/loop").symlink_to("loop")
    found = [run.path for run in read(tmp_path / "runs", tmp_path / "runs/a")]
    names = ["a", "a/inner", "link", "sweep/cells/b"]
    assert sorted(found) == [tmp_path / "runs" / name for name in names]


def test_a_folder_that_cannot_be_searched_is_said(
    tmp_path: Path, egtrain_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "runs/a")
    (tmp_path / "runs/closed").mkdir()
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", guarded)
    result = egtrain_command("runs")
    assert (result.code, len(result.stdout.splitlines())) == (0, 2)
    assert result.stderr == "warning: cannot search runs/closed for runs (Permission denied)\n"
    for wrong, reason in (("nowhere", "No such file"), ("runs/a/plan.json", "Not a directory")):
        result = egtrain_command("runs", wrong)
        assert result.code == 2
        assert result.line.startswith(f"cannot search {wrong} for runs ({reason}")


def test_a_done_run_is_read_as_its_files_say(tmp_path: Path) -> None:
    write_run(
        tmp_path / "a", "seed=3", "workers=8", "optimizer.lr=0.1", "optimizer.base_batch_size=64",
        steps=40, accuracy=0.75, best=0.8, started=1e9,
    )  # fmt: skip
    (run,) = read(tmp_path)
    assert run.state is State.done
    assert (run.preset, run.seed, run.batch_size) == ("quickstart", 3, 256)
    assert run.learning_rate == pytest.approx(0.4)
    assert (run.step, run.steps, run.seconds, run.started) == (40, 40, 4.0, 1e9)
    assert (run.test, run.best, run.newest) == (0.75, 0.8, None)
    assert run.final == {"test": {"loss": 1.5, "accuracy": 0.75}}


@pytest.mark.parametrize("preset", ["resnet-eg", "resnet-lars", "lstm-adam", "transformer-adam"])
@pytest.mark.parametrize("scaling", ["none", "sqrt", "linear"])
def test_the_rate_is_that_of_the_configuration(preset: str, scaling: str, tmp_path: Path) -> None:
    overrides = [f"optimizer.lr_scaling={scaling}", "workers=7"]
    config = load_config(preset, overrides)
    write_run(tmp_path / "a", *overrides, preset=preset)
    assert read(tmp_path)[0].learning_rate == config.optimizer.scaled_lr(config.batch_size)


def test_written_settings_are_read_as_by_the_parser(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    written = config_text("resnet-eg", "data.dir=/x 'y': \"z\" # \u00e9\u2028", "seed=7")
    texts = {
        "as written": written,
        "with a comment": f"# mine\n{written}",
        "with an end": written.replace("seed: 7", "seed: 7 # mine"),
        "otherwise indented": written.replace("  ", "    "),
        "otherwise written": "seed: 7\nworkers: 0x10\na: {b: [1, '2']}\nc:\n- 1.5\nd: |\n  text\n",
        "folded": "seed: 7\na: one\n  two\n",
        "empty": "seed: 7\na:\n",
        "in Windows": written.replace("\n", "\r\n"),
    }
    for name, text in texts.items():
        file.write_bytes(text.encode())
        expected = read_settings(file, "x").values
        assert read_written_settings(file, "x") == expected, name
        assert expected["seed"] == 7
    wrongs = (
        "seed: 1\nseed: 2\n",
        "a: &b 1\n",
        "a: !!x/y 1\n",
        "  a: 1\nb: 2\n",
        "",
        "a: b: c\n",
        "a: - 1\n",
    )
    for wrong in wrongs:
        file.write_text(wrong)
        with pytest.raises(UsageError) as slow:
            read_settings(file, "x")
        with pytest.raises(UsageError) as fast:
            read_written_settings(file, "x")
        assert str(fast.value) == str(slow.value)


# ---- states


def test_a_run_is_running_while_its_directory_is_held(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "a", (30, "train", 0.1), (30, "test", 0.25), (45, "train", 0.3))
    with RunLock(run):
        (held,) = read(tmp_path)
        with pytest.raises(UsageError, match="another run"):  # as before
            RunLock(run, patience_seconds=0).__enter__()
    assert (held.state, held.step, held.steps) == (State.running, 45, 100)
    assert held.newest == Evaluation("test", 30, 0.25)
    assert read(tmp_path)[0].state is State.interrupted


def test_a_done_run_that_is_extended_is_not_done(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps=100, accuracy=0.5)
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps(plan | {"steps": 200}))
    write_metrics(run, (100, "test", 0.5), (150, "train", 0.5), (150, "test", 0.6))
    (found,) = read(tmp_path)
    assert (found.state, found.step, found.steps) == (State.interrupted, 150, 200)
    assert (found.test, found.newest) == (None, Evaluation("test", 150, 0.6))


@pytest.mark.parametrize(
    ("exit_code", "state"), [(4, State.diverged), (1, State.failed), (3, State.failed)]
)
def test_a_run_that_noted_its_failure_has_failed(
    exit_code: int, state: State, tmp_path: Path
) -> None:
    run = unfinished(tmp_path / "a", (7, "train", 0.1))
    note = {"exit_code": exit_code, "message": "the loss became nan at step 8"}
    (run / "failure.json").write_text(json.dumps(note))
    (found,) = read(tmp_path)
    assert (found.state, found.message, found.step) == (state, note["message"], 7)
    with RunLock(run):
        assert read(tmp_path)[0].state is State.running


def test_a_final_metric_that_is_no_number_is_a_diverged_run(tmp_path: Path) -> None:
    write_run(tmp_path / "a", accuracy=None)
    (run,) = read(tmp_path)
    assert (run.state, run.message, run.test) == (
        State.diverged, "a final metric is not a number", None
    )  # fmt: skip


def test_a_run_that_has_just_begun_is_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.yaml").write_text(config_text("quickstart"))
    (run,) = read(tmp_path)
    assert (run.state, run.step, run.steps, run.metric) == (State.interrupted, 0, None, None)


def test_a_line_that_is_being_written_does_not_count(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "a", (30, "test", 0.25), (45, "train", 0.3))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 46, "epo')
    assert read(tmp_path)[0].step == 45
    (run / "metrics.jsonl").write_text('{"step": 46, "epo')
    assert read(tmp_path)[0].step == 0


@pytest.mark.parametrize("size", [1, 100, 100_000])
def test_the_last_evaluation_is_found_behind_any_number_of_lines(size: int, tmp_path: Path) -> None:
    lines = [(10, "train", 0.1), (10, "validation", 0.2), (10, "test", 0.3)]
    after = [(step, "train", 0.4) for step in range(11, 11 + size // 10)]
    run = unfinished(tmp_path / "a", *lines, *after)
    with (run / "metrics.jsonl").open("a") as file:  # longer than what is read at once
        file.write(json.dumps({"step": 9999, "split": "train", "long": "x" * size}) + "\n")
    (found,) = read(tmp_path)
    assert (found.step, found.newest) == (9999, Evaluation("test", 10, 0.3))


DAMAGE: dict[str, tuple[str, bytes]] = {
    "no YAML": ("config.yaml", b"seed: [1,\n"),
    "bytes": ("config.yaml", b"\xff\xfe\x00"),
    "empty": ("config.yaml", b""),
    "a list": ("config.yaml", b"- 1\n"),
    "two seeds": ("config.yaml", b"seed: 1\nseed: 2\n"),
    "a code": ("config.yaml", b"seed: !!python/object/apply:os.system [false]\n"),
    "no JSON": ("summary.json", b'{"steps": 1'),
    "no object": ("summary.json", b"[1, 2]"),
    "no bytes of text": ("summary.json", b"\xff\xfe"),
    "texts for numbers": ("summary.json", b'{"steps": 100, "final": {"test": {"loss": "low"}}}'),
    "a list of results": ("summary.json", b'{"steps": 100, "final": [1]}'),
    "infinite steps": ("summary.json", b'{"steps": Infinity}'),
    "a huge number": ("summary.json", b'{"steps": ' + b"9" * 400 + b"}"),
    "an infinite step": ("metrics.jsonl", b'{"step": Infinity, "split": "test"}\n'),
    "deep": ("summary.json", b"[" * 100_000),
    "a strange metric": ("plan.json", b'{"steps": 100, "metric": {"name": 3}}'),
    "no plan": ("plan.json", b"\x00" * 10),
    "no lines": ("metrics.jsonl", b"\x00" * 1000 + b"\n"),
    "other lines": ("metrics.jsonl", b'{"a": 1}\n'),
    "no failure": ("failure.json", b"{"),
}


@pytest.mark.parametrize(("file", "content"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_run_is_a_line_that_names_the_file(
    file: str, content: bytes, tmp_path: Path, egtrain_command: Command
) -> None:
    write_run(tmp_path / "runs/fine")
    (write_run(tmp_path / "runs/broken") / file).write_bytes(content)
    for further in ([], ["--json"], ["--csv"], ["--each", "--sort", "test"]):
        result = egtrain_command("runs", *further)
        assert (result.code, result.stderr) == (0, "")
        assert "broken" in result.stdout
        assert "damaged" in result.stdout
    (broken,) = (run for run in read(tmp_path) if run.path.name == "broken")
    assert broken.state is State.damaged
    assert file in broken.message


@pytest.mark.parametrize(
    "change",
    ["seed: many", "seed: true", "workers: 1.5", "worker_batch_size: null", "workers: -8"],
)
def test_a_setting_of_another_kind_is_damage(change: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    key = change.partition(":")[0]
    text = re.sub(f"^{key}: .*$", change, (run / "config.yaml").read_text(), flags=re.MULTILINE)
    (run / "config.yaml").write_text(text)
    assert read(tmp_path)[0].state is State.damaged
    assert len(table(tmp_path)) >= 2


def test_the_config_of_another_program_is_foreign(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.yaml").write_text("defaults:\n  - model: big\nseed: 1\n")
    os.utime(tmp_path / "theirs/config.yaml", (0, 0))
    assert table(tmp_path) == [
        "name    preset  batch  rate  steps  state    seed  test  time",
        "theirs              –     –      –  foreign     –     –     –",
        "theirs: foreign: config.yaml is not one of egtrain's, which have workers",
    ]


def test_files_that_are_no_files_do_not_stop_the_table(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    os.mkfifo(tmp_path / "config.yaml")
    (run / "failure.json").mkdir()
    assert [r.state for r in read(tmp_path)] == [State.done]


# ---- lines


def test_runs_that_differ_only_in_the_seed_are_one_line(tmp_path: Path) -> None:
    for seed, accuracy, best in ((0, 0.50, 0.4), (1, 0.54, 0.5), (2, 0.58, 0.9)):
        write_run(
            tmp_path / f"fine-s{seed}", f"seed={seed}", "log.every=5", f"data.dir=/x/{seed}",
            accuracy=accuracy, best=best, started=seed,
        )  # fmt: skip
    write_run(tmp_path / "other-s0", "extrapolation.ratio=0.5", accuracy=0.3, started=9)
    first, second = lines_of(tmp_path)
    assert (first.name, first.seeds, second.name) == ("fine-s*", [0, 1, 2], "other-s0")
    assert first.test is not None
    assert first.test.mean == pytest.approx(0.54)
    assert first.test.standard_deviation == pytest.approx(0.04)
    assert first.best is not None
    assert (first.best.mean, first.best.seeds) == (pytest.approx(0.6), 3)
    assert second.test == (0.3, None, 1)
    assert [line.name for line in lines_of(tmp_path, each=True)] == [
        "fine-s0", "fine-s1", "fine-s2", "other-s0"
    ]  # fmt: skip
    assert re.split("  +", table(tmp_path)[1]) == [
        "fine-s*", "quickstart", "512", "0.8", "1/K", "100", "done", "3",
        "54.00 ± 4.00 %", "60.00 ± 26.46 %", "0:00:10",
    ]  # fmt: skip


def test_equal_rates_are_equal_however_they_are_scaled(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "optimizer.lr=0.4", "optimizer.base_batch_size=256")
    write_run(tmp_path / "b", "seed=1", "optimizer.lr=0.8", "optimizer.lr_scaling=none")
    write_run(tmp_path / "c", "seed=1", "optimizer.lr=0.9", "optimizer.lr_scaling=none")
    assert [len(line.runs) for line in lines_of(tmp_path)] == [2, 1]


def test_only_done_runs_count_and_each_seed_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "seed=0", accuracy=0.9, started=1)
    write_run(tmp_path / "b", "seed=0", accuracy=0.5, started=2)
    write_run(tmp_path / "c", "seed=1", accuracy=0.6, started=3)
    unfinished(tmp_path / "d", (40, "test", 0.1), started=4)
    (line,) = lines_of(tmp_path)
    assert line.test is not None
    assert (line.test.mean, line.test.seeds) == (pytest.approx(0.55), 2)
    printed = table(tmp_path)
    assert "40/100  3 done, 1 interrupted      2  55.00 ± 7.07 %" in printed[1]
    assert printed[2:] == [
        "After ±: the standard deviation over 2 seeds.",
        "Of runs with equal seeds only the last one that is done counts.",
    ]


def test_before_the_end_the_newest_evaluation_is_shown_and_marked(tmp_path: Path) -> None:
    unfinished(tmp_path / "a", (40, "test", 0.25), started=1)
    write_run(tmp_path / "b", "workers=4", accuracy=0.5, best=0.75, started=2)
    unfinished(tmp_path / "c", (40, "validation", 0.125), started=3, preset="quickstart-sgd")
    assert table(tmp_path) == [
        "name  preset          batch  rate   steps  state        seed  test accuracy  "
        "best validation     time",
        "a     quickstart        512   0.8  40/100  interrupted     0       25.00 %*  "
        "              –  0:00:04",
        "b     quickstart        128   0.8     100  done            0        50.00 %  "
        "        75.00 %  0:00:10",
        "c     quickstart-sgd    512   0.8  40/100  interrupted     0              –  "
        "       12.50 %*  0:00:04",
        "* The newest evaluation of runs that are not done.",
    ]


def test_where_a_run_is_done_no_other_one_is_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "seed=1", accuracy=0.5, started=1)
    unfinished(tmp_path / "b", (40, "validation", 0.125), started=2)
    assert "50.00 %" in table(tmp_path)[1]
    assert "12.50 %" not in table(tmp_path)[1]


def test_the_settings_in_which_runs_differ_are_columns(tmp_path: Path) -> None:
    write_run(tmp_path / "a", started=1)
    write_run(tmp_path / "b", "schedule.warmup_epochs=0.5", "model.width=4", started=2)
    write_run(tmp_path / "c", "extrapolation.ratio=0.25", "task.augment=false", started=3)
    write_run(tmp_path / "d", preset="quickstart-sgd", started=4)
    write_run(tmp_path / "e", "data.name=npz:/a/very/long/path/to/images.npz", started=5)
    titles, *rows = table(tmp_path)
    # Not extrapolation.name, which differs too, but as the preset says.
    expected = ["ratio", "augment", "width", "data", "warmup epochs"]
    shown = re.split("  +", titles.strip())
    assert shown[:10] == ["name", "preset", "batch", "rate", *expected, "steps"]
    assert [row.split()[4] for row in rows] == ["1/K", "1/K", "0.25", "–", "1/K"]
    assert " …h/to/images.npz " in rows[4]


def test_settings_that_a_table_has_no_columns_for_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", started=1)
    write_run(
        tmp_path / "b", "extrapolation.ratio=0.25", "task.augment=false", "model.width=4",
        "optimizer.momentum=0.5", "optimizer.nesterov=false", "epochs=7",
        "compile=true", "optimizer.weight_decay=0.5",
    )  # fmt: skip
    assert "They differ in these settings too (see --csv): epochs, compile." in table(tmp_path)


def test_tables_fit_80_columns_and_lose_the_settings_before_the_results(tmp_path: Path) -> None:
    for number, preset in enumerate(("quickstart", "quickstart-sgd")):
        for seed in range(2):
            for batch in (4, 64):
                write_run(
                    tmp_path / f"{preset}-b{batch}-s{seed}", f"seed={seed}", f"workers={batch}",
                    f"model.width={4 + batch}", f"task.augment={str(seed < 9).lower()}",
                    preset=preset, best=0.25, accuracy=0.5 + 0.01 * seed, started=number,
                )  # fmt: skip
    lines = table(tmp_path, width=80)
    assert max(map(len, lines)) <= 80
    assert lines[-2].startswith("(no room for ")
    titles = " ".join(lines[0].split())
    assert titles.startswith("name preset batch")
    assert "test accuracy" in titles
    assert sum("50.50 ± 0.71 %" in line for line in lines) == 4
    assert max(map(len, table(tmp_path, width=140))) <= 140
    assert max(map(len, table(tmp_path, width=80, each=True))) <= 80


def test_metrics_of_several_kinds_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", started=1)
    text = write_run(tmp_path / "b", preset="lstm-sgd", started=2)
    metric = {"name": "perplexity", "unit": "", "higher_is_better": False}
    (text / "plan.json").write_text(json.dumps({"steps": 100, "metric": metric}))
    summary = {"metric": metric, "steps": 100, "final": {"test": {"loss": 4.5, "perplexity": 90.0}}}
    (text / "summary.json").write_text(json.dumps(summary))
    titles, first, second = table(tmp_path)
    assert titles.split()[-3:] == ["metric", "test", "time"]
    narrow = table(tmp_path, width=36)[0].split()
    assert "preset" not in narrow
    assert narrow[-2:] == ["metric", "test"]
    assert "accuracy    50.00 %" in first
    assert "perplexity    90.00" in second


def test_what_a_terminal_would_obey_is_not_printed(tmp_path: Path) -> None:
    write_run(tmp_path / "red\x1b[31m\n", "data.dir='/x'")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.yaml").write_text('"a\\e[31m": 1\nseed: "\\e[31m"\n')
    run = unfinished(tmp_path / "c", preset="quickstart-sgd")
    (run / "failure.json").write_text(json.dumps({"exit_code": 1, "message": "\x1b]0;x\x07"}))
    text = "\n".join(table(tmp_path))
    assert "\x1b" not in text
    assert "\x07" not in text


# ---- names


def test_a_line_has_a_name_that_is_only_its_own(tmp_path: Path) -> None:
    for name, overrides in {
        "one/x": ["seed=0", "epochs=4"],
        "two/x": ["seed=0", "epochs=5"],
        "a-10": ["seed=10", "epochs=6"],
        "a-11": ["seed=11", "epochs=6"],
        "b-10": ["seed=10", "epochs=7"],
        "b-11": ["seed=11", "epochs=7"],
        "b-12": ["seed=12", "epochs=8"],
        "first": ["seed=0", "epochs=9"],
        "second": ["seed=1", "epochs=9"],
    }.items():
        write_run(tmp_path / name, *overrides)
    names = {line.name for line in lines_of(tmp_path)}
    assert names == {
        str(tmp_path / "one/x"), str(tmp_path / "two/x"), "a-*", "b-10 +1", "b-12", "first +1"
    }  # fmt: skip


# ---- sorting


@pytest.mark.parametrize(
    ("column", "order"),
    [
        (None, "cbadef"),
        ("started", "cbadef"),
        ("name", "abcdef"),
        ("test", "bcadef"),
        ("accuracy", "bcadef"),
        ("batch", "acbefd"),
        ("rate", "bacefd"),
        ("state", "cbaefd"),
        ("steps", "fecbad"),
        ("time", "ecbadf"),
        ("optimizer.momentum", "bcaefd"),
        ("data.dir", "acbdef"),
    ],
)
def test_lines_are_sorted_by_any_column(
    column: str | None, order: str, tmp_path: Path, egtrain_command: Command
) -> None:
    write_run(tmp_path / "runs/c", "data.dir=/x/10", "workers=8", accuracy=0.5, started=1)
    write_run(
        tmp_path / "runs/b", "optimizer.momentum=0.5", "optimizer.lr=0.1", accuracy=0.9, started=2
    )
    write_run(
        tmp_path / "runs/a", "data.dir=/x/9", "workers=4", "optimizer.lr=0.2",
        accuracy=0.4, started=3,
    )  # fmt: skip
    damaged = write_run(tmp_path / "runs/d", started=4)
    (damaged / "config.yaml").write_text("{")
    os.utime(damaged / "config.yaml", (4, 4))
    unfinished(tmp_path / "runs/e", (40, "train", 0.5), started=5, preset="quickstart-sgd")
    run = unfinished(tmp_path / "runs/f", overrides=("epochs=99",), started=6)
    for file in ("metrics.jsonl", "plan.json"):
        (run / file).unlink()
    result = egtrain_command("runs", "--json", *([] if column is None else ["--sort", column]))
    names = [line["name"] for line in json.loads(result.stdout)]
    assert "".join(names) == order


def test_metrics_are_sorted_with_the_best_first(tmp_path: Path, egtrain_command: Command) -> None:
    for name, value in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        run = write_run(tmp_path / "runs" / name, f"epochs={value:.0f}", accuracy=value)
        text = (run / "plan.json").read_text().replace("true", "false")
        (run / "plan.json").write_text(text)
    result = egtrain_command("runs", "--json", "--sort", "accuracy")
    assert [line["name"] for line in json.loads(result.stdout)] == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("tset", "; did you mean 'test'?"),
        ("acuracy", "; did you mean 'accuracy'?"),
        ("optimizer.momentun", "; did you mean 'optimizer.momentum'?"),
        ("zzz", "; there are started, name, preset, batch,"),
    ],
)
def test_a_column_that_is_none_is_refused(
    typed: str, meant: str, tmp_path: Path, egtrain_command: Command
) -> None:
    write_run(tmp_path / "runs/a")
    result = egtrain_command("runs", "--sort", typed)
    assert (result.code, result.stdout) == (2, "")
    assert result.line.startswith(f"--sort {typed}: there is no such column{meant}")


# ---- for programs


def test_json_holds_every_run_and_what_the_table_shows(
    tmp_path: Path, egtrain_command: Command
) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"runs/a-s{seed}", f"seed={seed}", accuracy=0.5 + seed / 4, best=0.5)
    unfinished(tmp_path / "runs/b", (40, "test", 0.25), started=5, preset="quickstart-sgd")
    result = egtrain_command("runs", "--json")
    assert (result.code, result.stderr) == (0, "")
    first, second = json.loads(result.stdout, parse_constant=pytest.fail)
    assert first["runs"][1] == {
        "directory": "runs/a-s1",
        "seed": 1,
        "state": "done",
        "message": "",
        "steps": 100,
        "planned_steps": 100,
        "final": {"test": {"loss": 1.5, "accuracy": 0.75}},
        "best_validation": 0.5,
        "newest": None,
        "wall": {"seconds": 10.0, "started": "1970-01-01T00:00:00+00:00"},
    }
    assert first["test"] == {
        "mean": 0.625, "standard_deviation": pytest.approx(0.1767767), "seeds": 2
    }  # fmt: skip
    assert first["metric"] == {"name": "accuracy", "unit": "fraction", "higher_is_better": True}
    assert first["states"] == {"done": 2}
    assert first["settings"]["extrapolation.name"] == "local"
    assert second["settings"]["extrapolation.name"] == "none"
    assert second["runs"][0]["newest"] == {"split": "test", "step": 40, "value": 0.25}
    assert second["test"] is None


def test_csv_has_a_row_for_each_line_and_every_setting_that_differs(
    tmp_path: Path, egtrain_command: Command
) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"runs/a, b-s{seed}", f"seed={seed}", accuracy=0.5 + seed / 4)
    write_run(tmp_path / "runs/c", preset="quickstart-sgd", started=5)
    result = egtrain_command("runs", "--csv")
    assert (result.code, result.stderr) == (0, "")
    first, second = csv.DictReader(io.StringIO(result.stdout))
    expected = {
        "name": "a, b-s*",
        "directory": f"runs/a, b-s0{os.pathsep}runs/a, b-s1",
        "preset": "quickstart",
        "batch_size": "512",
        "workers": "16",
        "seeds": "0 1",
        "state": "done",
        "metric": "accuracy",
        "test": "0.625",
        "test_seeds": "2",
        "wall_seconds": "10.0",
        "extrapolation.name": "local",
        "extrapolation.ratio": "1/K",
    }
    assert {key: first[key] for key in expected} == expected
    assert (second["extrapolation.name"], second["extrapolation.ratio"]) == ("none", "")
    assert not {"seed", "optimizer.momentum", "preset.1"} & set(first)
    each = list(csv.DictReader(io.StringIO(egtrain_command("runs", "--csv", "--each").stdout)))
    assert [row["directory"] for row in each] == ["runs/a, b-s0", "runs/a, b-s1", "runs/c"]


def test_json_and_csv_exclude_each_other(egtrain_command: Command) -> None:
    result = egtrain_command("runs", "--json", "--csv")
    assert (result.code, result.line) == (2, "--json and --csv exclude each other: give one")


@pytest.mark.parametrize("exists", [False, True])
def test_where_there_are_no_runs_a_line_says_what_to_do(
    exists: bool, tmp_path: Path, egtrain_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EGTRAIN_RUNS", "mine")
    if exists:
        (tmp_path / "mine").mkdir()
    for further, printed in (([], ""), (["--json"], "[]\n")):
        result = egtrain_command("runs", *further)
        assert (result.code, result.stdout) == (0, printed)
        assert result.stderr == (
            "no runs in mine: `egtrain train` makes some, or name another folder\n"
        )
    assert len(egtrain_command("runs", "--csv").stdout.splitlines()) == 1


def test_the_folder_of_new_runs_is_searched_by_default(
    tmp_path: Path, egtrain_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "mine/a")
    write_run(tmp_path / "runs/b")
    assert egtrain_command("runs").stdout.splitlines()[1].startswith("b ")
    monkeypatch.setenv("EGTRAIN_RUNS", "mine")
    assert egtrain_command("runs").stdout.splitlines()[1].startswith("a ")
    assert egtrain_command("runs", "runs").stdout.splitlines()[1].startswith("b ")


# ---- speed, and the real thing


def test_hundreds_of_runs_take_a_fraction_of_a_second(tmp_path: Path) -> None:
    for number in range(300):
        run = tmp_path / f"{number // 50}" / f"run-{number}"
        overrides = [f"seed={number % 5}", f"workers={1 + number // 30}"]
        write_run(run, *overrides)
        if number % 3 == 0:
            (run / "summary.json").unlink()
    seconds = []
    for _ in range(3):
        before = time.process_time()
        printed = table(tmp_path)
        seconds.append(time.process_time() - before)
    assert len(printed) >= 11
    assert min(seconds) < 0.6


def test_the_table_does_without_torch_and_the_schema(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/a")
    program = (
        "import sys\nfrom egtrain.__main__ import main\nsys.argv = ['egtrain', 'runs']\n"
        "try:\n    main()\n"
        "finally:\n    assert not {'torch', 'numpy', 'egtrain.config.schema'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].startswith("a ")


def test_a_reader_that_goes_away_is_no_failure(tmp_path: Path) -> None:
    for number in range(200):
        write_run(tmp_path / f"runs/{number:0200}", f"epochs={number + 1}")
    for form in ("", "--json", "--csv"):
        done = subprocess.run(
            f"{sys.executable} -m egtrain runs {form} | head -c 10",
            shell=True, capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=60,
        )  # fmt: skip
        assert done.stderr == ""


def test_a_real_run_is_seen_while_it_runs_and_after_it_was_killed(
    images: Path, tmp_path: Path
) -> None:
    options = [*arguments(images, "epochs=100000"), "--output", "runs/a"]
    with Forked(options, tmp_path):
        wait_until(lambda: any(run.newest is not None for run in read(tmp_path)))
        (running,) = read(tmp_path)
        assert running.state is State.running
    (killed,) = read(tmp_path)
    assert killed.state is State.interrupted
    assert (killed.steps, killed.metric) == (400_000, running.metric)
    assert killed.seconds is not None


def test_a_real_run_has_the_results_of_its_summary(images: Path, tmp_path: Path) -> None:
    run = run_here(tmp_path / "a", config_of(images, "data.validation=32", "epochs=2"))
    summary = json.loads((run / "summary.json").read_text())
    (found,) = read(tmp_path)
    assert found.state is State.done
    assert found.test == summary["final"]["test"]["accuracy"]
    assert found.best == summary["best"]["validation"]["accuracy"]
    assert (found.step, found.steps) == (summary["steps"], summary["steps"])
    assert found.metric is not None
    assert found.metric == tuple(ImageTask.metric.facts().values())
