"""`egtrain runs`: what a run leaves to be read, and the table of runs."""

import json
import re
from collections.abc import Callable
from datetime import datetime, tzinfo
from importlib import import_module
from pathlib import Path

import pytest
from helpers import Result, arguments, command_line, config_of, run_here

from egtrain.errors import DivergedError

Command = Callable[..., Result]


@pytest.fixture
def egtrain_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Return a function that runs a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *command: command_line(capsys, *command)


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
