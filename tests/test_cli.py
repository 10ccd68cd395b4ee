"""The command line: what it accepts, what it refuses in one line, and what it prints."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    Forked,
    Result,
    arguments,
    command_line,
    config_of,
    environment,
    outcome,
    run_here,
    started,
    wait_until,
    write_images,
)

import egtrain
from egtrain.cli.options import overrides_of
from egtrain.config.files import load_config
from egtrain.run_directory import RunLock

pytestmark = pytest.mark.timeout(120)
Undisturbed = Callable[..., dict[str, Any]]


@pytest.fixture
def egtrain_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Return a function that runs a command in an empty folder, without the user's data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EGTRAIN_DATA", raising=False)
    return lambda *command: command_line(capsys, *command)


Run = Callable[..., Result]

# ---- expected failures: the code, and a line that says what to do


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--preset", "resnet-egg"], 2, "unknown preset 'resnet-egg'; did you mean 'resnet-eg'?"),
        (["--preset", "my.yaml"], 2, "my.yaml"),
        (
            ["--preset", "quickstart", "--set", "optimzer.lr=1"],
            2,
            "unknown key 'optimzer.lr'; did you mean 'optimizer",
        ),
        (
            ["--preset", "quickstart", "--set", "optimizer.lr"],
            2,
            "--set optimizer.lr: write KEY=VALUE",
        ),
        (
            ["--preset", "quickstart", "--set", "optimizer.lr=-1"],
            2,
            "optimizer.lr must be greater than 0, not -1",
        ),
        (["--preset", "quickstart", "--seed", "-1"], 2, "seed must be at least 0, not -1"),
        (["--preset", "quickstart", "--precision", "fp8"], 2, "precision must be"),
        (["--preset", "quickstart", "--device", "tpu"], 2, "device must be"),
        (["--preset", "quickstart", "--data", "cifar11"], 2, "data.name must be"),
        (["--preset", "quickstart", "--steps", "0"], 2, "steps must be at least 1, not 0"),
        (
            ["--preset", "quickstart", "--batch-size", "100"],
            2,
            "use 96 or 128, or give --workers too",
        ),
        (
            ["--preset", "quickstart", "--batch-size", "10"],
            2,
            "use 32 or 64, or give --workers too",
        ),
        (
            ["--preset", "quickstart", "--batch-size", "100", "--workers", "3"],
            2,
            "divide by 3 workers: use 99",
        ),
        (
            ["--preset", "quickstart", "--batch-size", "0"],
            2,
            "--batch-size must be at least 1, not 0",
        ),
        (["--preset", "quickstart", "--workers", "0"], 2, "--workers must be at least 1, not 0"),
        (
            ["--preset", "quickstart", "--nproc", "3"],
            2,
            "16 workers cannot be shared by 3 ranks: use --nproc 1, 2, 4",
        ),
        (["--preset", "quickstart", "--nproc", "0"], 2, "use --nproc 1, 2, 4, 8, 16"),
        (
            ["--preset", "quickstart", "--workers", "1000"],
            2,
            "larger than the 8192 training samples: take fewer",
        ),
        (["--preset", "quickstart", "--workers", "2147483647", "--nproc", "3"], 2, "use --nproc 1"),
        ([], 2, "name what to train: --preset NAME (see `egtrain presets`), or --resume DIR"),
        (
            ["--resume", "nowhere"],
            2,
            "nowhere holds no run: there is no config.yaml; name a directory that",
        ),
        (["--resume", "nowhere", "--preset", "quickstart"], 2, "leave out --preset and --output"),
        (["--preset", "resnet-eg", "--offline"], 3, "CIFAR-10"),
        (["--preset", "quickstart", "--data", "npz:none.npz"], 3, "none.npz: no such file"),
        (
            ["--preset", "quickstart", "--data", "npz:text.npz"],
            3,
            "text.npz: not a readable .npz file",
        ),
        (
            ["--preset", "quickstart", "--data", "npz:short.npz"],
            3,
            "short.npz: not a readable .npz file",
        ),
        (["--preset", "quickstart", "--data", "npz:code.npz"], 3, "code.npz: "),
        (["--preset", "quickstart", "--output", "file"], 2, "cannot write to file"),
        (["--preset", "quickstart", "--output", "file/run"], 2, "cannot write to file/run"),
        (["--preset", "quickstart", "--output", "/proc/run"], 2, "cannot write to /proc/run"),
        (
            ["--preset", "quickstart", "--output", "/proc/run", "--nproc", "2"],
            2,
            "cannot write to /proc/run",
        ),
    ],
)
def test_an_expected_failure_is_one_line_with_the_fix(
    options: list[str], code: int, message: str, egtrain_command: Run, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "text.npz").write_text("not an archive")
    data = write_images(tmp_path / "short.npz", train=20, test=4).read_bytes()
    (tmp_path / "short.npz").write_bytes(data[: len(data) // 2])
    np.savez(
        tmp_path / "code.npz",
        **{f"{x}_{split}": np.array([{}]) for x in "xy" for split in ("train", "test")},
    )
    result = egtrain_command("train", *options)
    assert (result.code, result.stdout) == (code, "")
    assert message in result.line
    # Nothing has begun, so nothing is left, and the corrected command finds no run in its way.
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left - {"runs"} == {"file", "text.npz", "short.npz", "code.npz"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "--seed -1: seed must be at least 0, not -1"),
        (["--checkpoint-every", "0"], "--checkpoint-every 0: checkpoint.every must be at least 1"),
        (["--data", "cifar11"], "--data cifar11: data.name must be "),
        (["--set", "seed=-1"], "--set seed=-1: seed must be at least 0, not -1"),
        (["--set", "optimizer.lr=abc"], "--set optimizer.lr=abc: optimizer.lr must be a number"),
    ],
)
def test_a_wrong_option_is_called_what_the_user_typed(
    options: list[str], message: str, egtrain_command: Run
) -> None:
    assert egtrain_command("train", "--preset", "quickstart", *options).line.startswith(message)


def test_a_device_that_is_not_there_is_refused(
    egtrain_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = egtrain_command("train", "--preset", "quickstart", "--device", "cuda")
    assert result.code == 2
    assert "no CUDA device was found: use --device cpu" in result.line


def test_nproc_inside_torchrun_is_refused(tmp_path: Path) -> None:
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    with Forked(["train", "--preset", "quickstart", "--nproc", "2"], tmp_path, rank) as process:
        assert process.wait() == 2
    assert (
        process.stderr == "egtrain: torchrun has started the processes already: leave out --nproc\n"
    )


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("train --preset quickstart --preset quickstart-sgd", "--preset"),
        ("train --preset quickstart --seed 1 --epochs 2 --seed 1", "--seed"),
        ("bench --preset quickstart --preset quickstart-sgd", "--preset"),
        ("eval runs/a --split test --split validation", "--split"),
        ("plot-sharpness runs/a --output a --output=b", "--output"),
        ("sweep-batch --preset quickstart --batch-sizes 64 --batch-sizes 256", "--batch-sizes"),
    ],
)
def test_an_option_that_takes_one_value_is_refused_twice(
    command: str, option: str, egtrain_command: Run
) -> None:
    result = egtrain_command(*command.split())
    assert (result.code, result.stdout) == (2, "")
    assert result.line == f"{option} is given twice, and takes one value: give one"


def test_an_option_that_takes_several_values_and_a_flag_may_be_repeated(
    egtrain_command: Run,
) -> None:
    twice = ["--set", "seed=1", "--set", "optimizer.lr=1", "--dry-run", "--json", "--json"]
    assert egtrain_command("train", "--preset", "quickstart", *twice).code == 0


def test_the_option_of_the_launchers_ranks_is_not_for_users(
    egtrain_command: Run, images: Path, tmp_path: Path
) -> None:
    run_here(tmp_path / "run", config_of(images, "steps=2"))
    result = egtrain_command("train", "--rank-of", "run")
    assert (result.code, result.line) == (
        2,
        "--rank-of is for the processes of --nproc: use --resume run",
    )
    assert "--rank-of" not in egtrain_command("train", "--help").stdout


@pytest.mark.parametrize("left_over", ["RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"])
def test_a_variable_left_over_by_another_launcher_does_not_matter(
    left_over: str,
    egtrain_command: Run,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In another process: one that takes itself for a rank would end this one, with code 0.
    with Forked(["train", "--preset", "nosuch"], tmp_path, {left_over: "3"}) as process:
        assert process.wait() == 2
    assert process.stderr.startswith("egtrain: unknown preset 'nosuch'")
    monkeypatch.setenv(left_over, "3")
    assert egtrain_command(*arguments(images, "steps=1")).code == 0


def test_a_rank_that_reaches_no_other_prints_its_error(tmp_path: Path) -> None:
    rank = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}
    with Forked(["train", "--preset", "nosuch"], tmp_path, rank) as process:
        assert process.wait() == 2
    assert process.stderr.startswith("egtrain: rank 3: unknown preset 'nosuch'")


def test_an_unknown_option_is_refused_without_a_traceback(egtrain_command: Run) -> None:
    result = egtrain_command("train", "--presett", "quickstart")
    assert result.code == 2
    assert "--presett" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_loss_that_becomes_infinite_is_exit_4(egtrain_command: Run, images: Path) -> None:
    options = [*arguments(images, "optimizer.lr=1e30", extrapolation="none"), "--output", "run"]
    result = egtrain_command(*options)
    assert result.code == 4
    assert result.line.startswith("the loss of worker 0 became nan at step ")


def test_an_unexpected_failure_shows_where(
    egtrain_command: Run, monkeypatch: pytest.MonkeyPatch, images: Path
) -> None:
    monkeypatch.setattr("egtrain.session.build_run", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        egtrain_command(*arguments(images))


# ---- run directories


def test_a_directory_that_holds_another_run_is_refused(
    egtrain_command: Run, images: Path, tmp_path: Path
) -> None:
    run_here(tmp_path / "run", config_of(images, "steps=2"))
    before = outcome(tmp_path / "run")
    for further in ([], ["--nproc", "2"]):
        result = egtrain_command(*arguments(images, "seed=1"), "--output", "run", *further)
        assert result.code == 2
        assert (
            result.line
            == "run holds a run already: go on with --resume run, or choose another --output"
        )
    assert outcome(tmp_path / "run") == before


@pytest.mark.parametrize("further", [[], ["--nproc", "2"]], ids=["alone", "with ranks"])
def test_a_directory_that_another_process_writes_to_is_refused(
    further: list[str], egtrain_command: Run, images: Path, tmp_path: Path
) -> None:
    run_here(tmp_path / "run", config_of(images, "steps=2"))
    config = (tmp_path / "run/config.yaml").read_bytes()
    with RunLock(tmp_path / "run"):
        result = egtrain_command(
            "train", "--resume", "run", "--steps", "4", "--allow-changes", *further
        )
    assert result.code == 2
    message = (
        f"egtrain: another run (process {os.getpid()}) is writing to run: "
        "wait for it to end, or choose"
    )
    assert result.stderr.splitlines()[-1].startswith(message)
    assert (tmp_path / "run/config.yaml").read_bytes() == config


def test_resume_with_other_settings_shows_them_and_is_refused_unless_allowed(
    egtrain_command: Run, images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    run_here(tmp_path / "run", config_of(images, "schedule.decay=constant", "epochs=2"))
    changes = ["--epochs", "3", "--set", "log.every=1"]
    result = egtrain_command("train", "--resume", "run", *changes)
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        "changed: epochs: 2 -> 3",
        "egtrain: the settings differ from those of the run: leave them out, or add "
        "--allow-changes",
    ]
    assert outcome(tmp_path / "run")["step"] == 8

    result = egtrain_command("train", "--resume", "run", *changes, "--allow-changes")
    assert result.code == 0
    assert result.stderr.splitlines() == [
        "changed: epochs: 2 -> 3",
        "the plan has changed: 12 steps instead of 8; learning rate 0.1 at step 8, 0.1 at step 9",
    ]
    assert outcome(tmp_path / "run") == undisturbed("schedule.decay=constant")
    assert "epochs: 3\n" in (tmp_path / "run/config.yaml").read_text()


@pytest.mark.parametrize("further", [[], ["--nproc", "2"]], ids=["alone", "with ranks"])
def test_changes_that_do_not_fit_the_checkpoint_leave_the_run_as_it_was(
    further: list[str], egtrain_command: Run, images: Path, tmp_path: Path
) -> None:
    run_here(tmp_path / "run", config_of(images, "steps=2"))
    config = (tmp_path / "run/config.yaml").read_bytes()
    change = ["--set", "steps=3", "--set", "model.width=5", "--allow-changes"]
    result = egtrain_command("train", "--resume", "run", *change, *further)
    assert result.code == 2
    if not further:  # ranks write to the process's own stderr
        assert "the checkpoint has another architecture" in result.stderr
    assert (tmp_path / "run/config.yaml").read_bytes() == config


def test_epochs_take_back_the_steps_of_a_preset(egtrain_command: Run, tmp_path: Path) -> None:
    (tmp_path / "steps.yaml").write_text("inherits: [quickstart]\nsteps: 100\n")
    result = egtrain_command(
        "train", "--preset", "steps.yaml", "--epochs", "3", "--dry-run", "--json"
    )
    assert json.loads(result.stdout)["steps"] == 3 * 16
    both = egtrain_command("train", "--preset", "steps.yaml", "--epochs", "3", "--steps", "2")
    assert (both.code, both.line) == (2, "--epochs and --steps exclude each other: give one")


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / 'data \U0001f600 "a": #b'
    overrides = overrides_of(None, folder, False, None, {})
    assert load_config("quickstart", overrides).data.dir == str(folder)


def test_resume_with_the_same_settings_needs_no_permission(
    egtrain_command: Run, images: Path, tmp_path: Path
) -> None:
    run_here(tmp_path / "run", config_of(images, "steps=2"))
    assert (
        egtrain_command(
            "train", "--resume", "run", "--steps", "2", "--workers", "4", "--seed", "0"
        ).code
        == 0
    )


def test_the_warm_up_that_was_trained_is_written_down_and_resumed(
    egtrain_command: Run, images: Path, tmp_path: Path
) -> None:
    short = ["--set", "steps=4", "--output", "run"]
    assert egtrain_command(*arguments(images), *short).code == 0
    assert "  warmup_epochs: 0.5\n" in (tmp_path / "run/config.yaml").read_text()
    rates = [line["learning_rate"] for line in outcome(tmp_path / "run")["metrics"][:3]]
    assert rates == pytest.approx([0.1, 0.1, 0.1])
    before = outcome(tmp_path / "run")
    assert egtrain_command("train", "--resume", "run").code == 0
    assert outcome(tmp_path / "run") == before


def test_a_warm_up_that_was_set_and_does_not_fit_is_refused_and_leaves_nothing(
    egtrain_command: Run, images: Path, tmp_path: Path
) -> None:
    mine = arguments(images, "schedule.shorten_warmup=false", "steps=4")
    for further in ([], ["--dry-run"]):
        result = egtrain_command(*mine, "--output", "run", *further)
        assert result.code == 2
        assert result.line == (
            "schedule.warmup_epochs 1 takes 4 steps, and the run ends at step 4: "
            "set it to at most 0.75, or train longer"
        )
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"{", b"seed: many", b"sed: 1"])
def test_a_damaged_configuration_is_refused_in_a_line(
    content: bytes, egtrain_command: Run, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    for command in (["train", "--resume", "."], ["eval", "."]):
        result = egtrain_command(*command)
        assert result.code == 2
        assert "config.yaml" in result.line


def test_a_run_without_a_name_gets_one(egtrain_command: Run, images: Path, tmp_path: Path) -> None:
    assert egtrain_command(*arguments(images, "steps=1")).code == 0
    (directory,) = (tmp_path / "runs").iterdir()
    name, _, stamp = directory.name.partition("-")
    assert (name, len(stamp)) == ("quickstart", len("20260101-120000"))


def test_a_run_in_the_current_directory_has_its_name(
    egtrain_command: Run, images: Path, tmp_path: Path
) -> None:
    result = egtrain_command(*arguments(images, "steps=1"), "--output", ".")
    assert result.code == 0
    assert json.loads((tmp_path / "summary.json").read_text())["name"] == tmp_path.name
    assert f"{tmp_path.name}: done at step 1 of 1" in result.stdout
    assert "gradient evaluations in 1 step;" in result.stdout


# ---- batch size and workers, dry runs, JSON


@pytest.mark.parametrize(
    ("options", "workers", "share"),
    [
        ([], 16, 32),
        (["--workers", "4"], 4, 32),
        (["--batch-size", "128"], 4, 32),
        (["--batch-size", "128", "--workers", "2"], 2, 64),
        (["--workers", "2", "--batch-size", "34"], 2, 17),
        (["--batch-size", "512"], 16, 32),
        (["--workers", "3"], 3, 32),
    ],
)
def test_batch_size_and_workers_alone_keep_the_share_of_a_worker(
    options: list[str], workers: int, share: int, egtrain_command: Run
) -> None:
    result = egtrain_command("train", "--preset", "quickstart", "--dry-run", "--json", *options)
    plan = json.loads(result.stdout)
    assert (plan["workers"], plan["worker_batch_size"], plan["batch_size"]) == (
        workers,
        share,
        workers * share,
    )


def test_the_ratio_follows_the_workers(egtrain_command: Run, images: Path, tmp_path: Path) -> None:
    """The ratio 1/K gives the small batch's rate, so it changes with K."""
    sizes = []
    for workers, ratio in (("2", "1/K"), ("2", "0.5"), ("2", "0.25")):
        output = f"run-{len(sizes)}"
        options = [
            *arguments(images, "steps=2", f"extrapolation.ratio={ratio}"),
            "--workers",
            workers,
        ]
        assert egtrain_command(*options, "--output", output).code == 0
        sizes.append(outcome(tmp_path / output)["metrics"][1]["extrapolation_size"])
    assert sizes[0] == sizes[1] == pytest.approx(2 * sizes[2])


def test_a_dry_run_prints_the_plan_and_makes_nothing(
    egtrain_command: Run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("egtrain.session.train", pytest.fail)
    options = [*arguments(images), "--output", "run", "--nproc", "2", "--dry-run"]
    result = egtrain_command(*options, "--json")
    assert (result.code, result.stderr) == (0, "")
    plan = json.loads(result.stdout)
    expected = {
        "batch_size": 32,
        "workers": 4,
        "worker_batch_size": 8,
        "ranks": 2,
        "steps": 12,
        "steps_per_epoch": 4,
    }
    assert {name: plan[name] for name in expected} == expected
    assert plan["learning_rate"] == {"0": 0.1, "4": 0.1, "6": 0.085355, "11": 0.003806}
    assert plan["extrapolation"] == "local"
    assert str(images) in plan["data"]
    assert plan["directory"] == "run"

    text = egtrain_command(*options).stdout
    for part in (
        "batch       32 = 4 workers x 8\n",
        "runs on     CPU in fp32, 2 processes, 1 thread each\n",
        "steps       12, 4 an epoch\n",
        "rates       0.1 at step 0, 0.08536 at 6, 0.003806 at 11\n",
    ):
        assert part in text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_without_the_data_says_so(egtrain_command: Run) -> None:
    result = egtrain_command("train", "--preset", "resnet-eg", "--offline", "--dry-run", "--json")
    assert result.code == 0
    plan = json.loads(result.stdout)
    assert (plan["batch_size"], plan["workers"]) == (2048, 16)
    assert "missing" in plan["data"]
    assert plan["missing"].startswith("CIFAR-10 was not found in ")
    text = egtrain_command("train", "--preset", "resnet-eg", "--offline", "--dry-run").stdout
    assert "note        steps, rates, time and memory are known once the data are there\n" in text


@pytest.mark.parametrize(
    ("preset", "data", "message"),
    [
        ("quickstart", "npz:{}/none.npz", "none.npz: no such file"),
        ("quickstart", "npz:{}/text.npz", "text.npz: not a readable .npz file"),
        ("quickstart-lstm", "text:{}/none", "no such file or folder"),
        ("quickstart-lstm", "text:{}", "train.txt"),
        ("quickstart-transformer", "pairs:{}/none", "no such file or folder"),
        ("quickstart-transformer", "pairs:{}", "train.en: the file is missing"),
    ],
)
def test_a_dry_run_fails_where_training_would_fail_on_bad_data(
    preset: str, data: str, message: str, egtrain_command: Run, tmp_path: Path
) -> None:
    (tmp_path / "text.npz").write_text("not an archive")
    options = ["--preset", preset, "--data", data.format(tmp_path)]
    for further in (["--dry-run"], ["--dry-run", "--json"], []):
        result = egtrain_command("train", *options, *further)
        assert (result.code, result.stdout) == (3, "")
        assert message in result.line


def test_a_dry_run_fails_where_a_data_set_is_incomplete(
    egtrain_command: Run, tmp_path: Path
) -> None:
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin/test_batch.bin").write_bytes(b"")
    result = egtrain_command(
        "train", "--preset", "resnet-eg", "--data-dir", str(tmp_path), "--dry-run"
    )
    assert result.code == 3
    assert "CIFAR-10 is incomplete" in result.line


def test_json_stands_alone_on_standard_output(
    egtrain_command: Run, images: Path, tmp_path: Path
) -> None:
    for command in ([*arguments(images), "--output", "run"], ["train", "--resume", "run"]):
        result = egtrain_command(*command, "--json")
        assert result.code == 0
        printed = json.loads(result.stdout)
        summary = json.loads((tmp_path / "run/summary.json").read_text())
        assert printed == {"directory": "run", **summary}


def test_json_is_json_where_a_number_is_not(
    egtrain_command: Run, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = {"loss": float("nan"), "accuracy": 0.25}
    monkeypatch.setattr("egtrain.train.evaluate", lambda *_: nothing)
    monkeypatch.setattr("egtrain.saved_run.evaluate", lambda *_: nothing)
    for command in (
        [*arguments(images, "steps=1"), "--output", "run"],
        ["train", "--resume", "run"],
    ):
        printed = json.loads(egtrain_command(*command, "--json").stdout, parse_constant=pytest.fail)
        assert printed["final"] == {"test": {"loss": None, "accuracy": 0.25}}
    assert "test: accuracy 25.00 %, loss –\n" in egtrain_command("train", "--resume", "run").stdout
    printed = json.loads(
        egtrain_command("eval", "run", "--json").stdout, parse_constant=pytest.fail
    )
    assert printed["loss"] is None


# ---- help


def user_seconds(program: str) -> float:
    """Return the least processor time of five runs; wall-clock time depends on other processes."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert "Usage: " in done.stdout
        seconds.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    return min(seconds)


@pytest.mark.parametrize(
    "command",
    ["", "train", "eval", "export", "sweep-batch", "plot-sharpness", "bench", "runs", "presets"],
)
def test_help_is_quick_and_does_without_torch(command: str) -> None:
    seconds = user_seconds(
        "import sys\n"
        "from egtrain.__main__ import main\n"
        f"sys.argv = {['egtrain', *command.split(), '--help']}\n"
        "try:\n    main()\n"
        "finally:\n    assert not {'torch', 'numpy', 'tensorboard', 'yaml'} & set(sys.modules)\n"
    )
    # What Typer alone takes says how slow this machine is just now.
    least = (
        "import typer\ndef f(x: str = typer.Option('')): pass\n"
        "import sys\nsys.argv = ['f', '--help']\ntyper.run(f)\n"
    )
    # Typer loads pydantic for the options of a subcommand, if it is installed.
    allowance, factor = (0.6, 3) if command else (0.3, 1.6)
    assert seconds < allowance or seconds < factor * user_seconds(least)


@pytest.mark.parametrize(
    "command",
    ["", "train", "eval", "export", "sweep-batch", "plot-sharpness", "bench", "runs", "presets"],
)
def test_every_help_fits_80_columns_and_has_its_example_on_a_line(
    command: str, egtrain_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    short, long = (egtrain_command(*command.split(), flag) for flag in ("-h", "--help"))
    assert short == long
    assert (long.code, long.stderr) == (0, "")
    lines = [line.strip() for line in long.stdout.splitlines()]
    assert max(map(len, lines)) <= 80
    assert "…" not in long.stdout
    # Only choices are in angle brackets, and no Python types such as <bool> or <list[Path]>.
    assert not re.search(r"<[^|>]*>", long.stdout)
    assert "[x>" not in long.stdout
    if command:
        (example,) = [i for i, line in enumerate(lines) if line.startswith("Example: egtrain ")]
        assert lines[example - 1] == lines[example + 1] == ""


def test_the_shell_completes_presets_at_once_and_without_torch(tmp_path: Path) -> None:
    words = {"COMP_WORDS": "egtrain train --preset quickstart-", "COMP_CWORD": "3"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\nfrom egtrain.__main__ import main\nsys.argv = ['egtrain']\n"
            "try:\n    main()\nfinally:\n    assert not {'torch', 'numpy'} & set(sys.modules)\n",
        ],
        capture_output=True,
        text=True,
        env={**environment(), **words, "_EGTRAIN_COMPLETE": "complete_bash"},
        cwd=tmp_path,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [
        "quickstart-lstm",
        "quickstart-sgd",
        "quickstart-transformer",
    ]


@pytest.fixture
def ctrl_c_ignored_here() -> Iterator[None]:
    """Ignore Ctrl-C, as a background job does; what the tests start must not be affected."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_ignored_here")
def test_ctrl_c_during_the_import_of_torch_ends_the_command(tmp_path: Path) -> None:
    """Parts of torch and NumPy catch any exception during their import."""
    (tmp_path / "torch.py").write_text(
        "import pathlib, time\n"
        "try:\n    pathlib.Path('importing').touch()\n    time.sleep(30)\n"
        "except BaseException:\n    time.sleep(30)\n"
    )
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    for command in (["train", "--preset", "quickstart"], ["eval", "runs/some"]):
        with started(
            [sys.executable, "-m", "egtrain", *command], tmp_path, PYTHONPATH=path
        ) as process:
            wait_until((tmp_path / "importing").exists)
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130
        (tmp_path / "importing").unlink()


def test_the_version_is_printed(egtrain_command: Run) -> None:
    result = egtrain_command("--version")
    assert (result.code, result.stdout) == (0, f"egtrain {egtrain.__version__}\n")


def test_every_option_of_the_design_is_there(
    egtrain_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = egtrain_command("train", "--help").stdout
    options = (
        "data data-dir offline epochs steps workers batch-size seed nproc device precision "
        "compile no-compile "
        "deterministic checkpoint-every max-restarts output output-root name dry-run json set "
        "preset resume allow-changes"
    )
    for option in options.split():
        assert f"--{option}" in text
