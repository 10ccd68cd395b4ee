"""K is the algorithm, R is only how it is run; and what happens to one rank happens to the run."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    Fault,
    Stop,
    arguments,
    config_of,
    digest,
    flattened,
    forked_ranks,
    metrics_in,
    newest_checkpoint,
    outcome,
    processes_of,
    run_here,
    run_on_ranks,
    started,
    steps_logged,
    terminate,
    wait_until,
)
from torch import Tensor

from egtrain import launch
from egtrain.checkpoint import RunLock, read_checkpoint
from egtrain.errors import DataError, UsageError
from egtrain.launch import OUTCOMES

pytestmark = pytest.mark.timeout(180)
Undisturbed = Callable[..., dict[str, Any]]

LONG = ["steps=120", "evaluate_every=10", "checkpoint.every=4"]
"""Settings of runs that are long enough to be disturbed from outside."""


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("extrapolation", ["local", "gradient-noise"])
def test_any_number_of_ranks_gives_the_same_run_bit_for_bit(
    extrapolation: str, ranks: int, images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    run_on_ranks([*arguments(images, extrapolation=extrapolation), "--output", "run"], tmp_path, ranks)
    assert outcome(tmp_path / "run") == undisturbed(extrapolation=extrapolation)
    assert json.loads((tmp_path / "run/summary.json").read_text())["ranks"] == ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_without_deterministic_ranks_agree_up_to_rounding(ranks: int, images: Path, tmp_path: Path) -> None:
    alone = run_here(tmp_path / "alone", config_of(images, deterministic=False))
    run_on_ranks([*arguments(images, deterministic=False), "--output", "run"], tmp_path, ranks)

    expected, found = (
        flattened(read_checkpoint(newest_checkpoint(directory))[1]) for directory in (alone, tmp_path / "run")
    )
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert found[name] == pytest.approx(value, abs=1e-5), name
    for line, expected_line in zip(metrics_in(tmp_path / "run"), metrics_in(alone), strict=True):
        expected_line.pop("noise_scale", None)  # a difference of nearly equal numbers over another
        assert {key: line[key] for key in expected_line} == pytest.approx(expected_line, rel=1e-3, abs=1e-5)


def test_a_run_saved_on_two_ranks_goes_on_on_one(images: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    with forked_ranks([*arguments(images), "--output", "run"], tmp_path, 2, Stop(after=6, rank=1)) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
        assert ranks[0].stderr == "egtrain: interrupted after step 6; a checkpoint was saved; go on with --resume run\n"
        assert ranks[1].stderr == ""
    assert outcome(tmp_path / "run")["step"] == 6
    run_here(tmp_path / "run", config_of(images), resume=True)
    assert outcome(tmp_path / "run") == undisturbed()


def test_a_run_saved_on_one_rank_goes_on_on_two(images: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="interrupted after step 6"):
        run_here(tmp_path / "run", config_of(images), stop_after=6)
    run_on_ranks(["train", "--resume", "run"], tmp_path, 2)
    assert outcome(tmp_path / "run") == undisturbed()


@pytest.mark.slow
def test_nproc_goes_on_after_a_rank_was_killed(images: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "egtrain", *arguments(images, *LONG), "--output", "run", "--json"]
    when = random.Random(5).randrange(5, 40)
    with started([*command, "--nproc", "2", "--max-restarts", "1"], tmp_path) as process:
        wait_until(lambda: steps_logged(tmp_path / "run") >= when, 120)
        (note,) = tmp_path.glob("egtrain-*/rank-1")
        os.kill(int(note.read_text()), signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=150)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["steps"] == 120
    assert "SIGKILL" in stderr  # torchrun saw it, so there was a restart
    assert outcome(tmp_path / "run") == undisturbed(*LONG)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_nproc_saves_on_all_ranks_and_leaves_no_process(
    number: int, images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "egtrain", *arguments(images, *LONG), "--output", "run", "--nproc", "2"]
    with started(command, tmp_path) as process:
        # One arrives in the middle of the run, the other while torchrun and the ranks are starting.
        wait_until(lambda: steps_logged(tmp_path / "run") >= 3 or number == signal.SIGINT and _launched(tmp_path), 120)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 75, stderr
        assert processes_of(tmp_path) == []
        assert not list(tmp_path.glob("egtrain-*"))
    step = outcome(tmp_path / "run")["step"]
    assert stderr == f"egtrain: interrupted after step {step}; a checkpoint was saved; go on with --resume run\n"
    assert step == 1 or number == signal.SIGTERM
    run_here(tmp_path / "run", config_of(images, *LONG), resume=True)
    assert outcome(tmp_path / "run") == undisturbed(*LONG)


def _launched(folder: Path) -> bool:
    return any(folder.glob("egtrain-*/launcher"))


@pytest.mark.slow
def test_plain_torchrun_agrees_on_a_directory_and_an_interrupted_rank_succeeds(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", "-m", "egtrain", *arguments(images, *LONG)]
    with started(command, tmp_path) as process:
        (directory,) = wait_until(lambda: list(tmp_path.glob("runs/*")), 120)
        wait_until(lambda: steps_logged(directory) >= 3)
        (rank,) = [pid for pid in processes_of(tmp_path) if _variable(pid, "RANK") == "1"]
        os.kill(rank, signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        assert processes_of(tmp_path) == []
    step = outcome(directory)["step"]
    assert f"egtrain: interrupted after step {step}; a checkpoint was saved" in stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.glob("runs/*")) == [directory]
    run_here(directory, config_of(images, *LONG), resume=True)
    assert outcome(directory) == undisturbed(*LONG)


def _variable(pid: int, name: str) -> str | None:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return next((pair.partition("=")[2] for pair in pairs if pair.startswith(f"{name}=")), None)


@pytest.mark.slow
def test_an_expected_failure_under_nproc_is_one_line_and_its_own_code(images: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "egtrain", *arguments(images), "--output", "run", "--nproc", "2"]
    broken = [*command, "--data", "npz:missing.npz", "--max-restarts", "3"]
    with started(broken, tmp_path) as process:
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 3, stderr
    assert stdout == ""
    assert stderr.splitlines() == [
        "egtrain: missing.npz: no such file; give the path of an .npz file, as in --data npz:images.npz"
    ]
    # Nothing was trained, so the corrected command may use the directory.
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.slow
def test_nothing_is_left_when_torchrun_or_the_launcher_is_killed(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "egtrain", *arguments(images, *LONG), "--output", "run", "--nproc", "2"]
    with started(command, tmp_path) as process:
        wait_until(lambda: steps_logged(tmp_path / "run") >= 3, 120)
        (torchrun,) = [pid for pid in processes_of(tmp_path) if _parent(pid) == process.pid]
        os.kill(torchrun, signal.SIGKILL)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 75, stderr
        assert processes_of(tmp_path) == []
    run_here(tmp_path / "run", config_of(images, *LONG), resume=True)
    assert outcome(tmp_path / "run") == undisturbed(*LONG)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def notes_of_launcher(folder: Path, pid: int, stop: bool = False) -> Path:
    notes = folder / "notes"
    notes.mkdir()
    (notes / "launcher").write_text(str(pid))
    if stop:
        (notes / "stop").touch()
    return notes


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("killed", [True, False])
def test_ranks_save_and_leave_when_their_launcher_died_or_had_left_word(
    killed: bool, images: Path, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = notes_of_launcher(tmp_path, dead_process() if killed else os.getpid(), stop=not killed)
    monkeypatch.setenv(OUTCOMES, str(notes))
    with forked_ranks([*arguments(images), "--output", "run"], tmp_path, 2) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert (notes / "exit").read_text() == "75"
    assert outcome(tmp_path / "run")["step"] == 1
    monkeypatch.delenv(OUTCOMES)
    run_here(tmp_path / "run", config_of(images), resume=True)
    assert outcome(tmp_path / "run") == undisturbed()


def test_a_signal_to_one_rank_during_the_start_is_not_lost(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    fault = Fault(terminate, in_data=True, rank=1)
    with forked_ranks([*arguments(images), "--output", "run"], tmp_path, 2, fault) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert outcome(tmp_path / "run")["step"] == 1
    run_here(tmp_path / "run", config_of(images), resume=True)
    assert outcome(tmp_path / "run") == undisturbed()


def fail_to_read() -> None:
    raise DataError("this machine cannot read them: mount the disk")


def small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def not_a_number() -> None:
    from helpers import ImageTask

    loss = ImageTask.loss
    ImageTask.loss = lambda *values: [part * float("nan") for part in loss(*values)]  # type: ignore[assignment, method-assign, return-value]


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (Fault(fail_to_read, in_data=True, rank=1), 3, "this machine cannot read them: mount the disk"),
        (Fault(fail_to_read, in_data=True, rank=0), 3, "this machine cannot read them: mount the disk"),
        (Fault(small_files_only, step=1, rank=0), 1, "cannot write run/checkpoints/step-00000004.pt: File too large"),
        (Fault(not_a_number, step=2, worker=3), 4, "the loss of worker 3 became nan at step 3: lower optimizer.lr"),
    ],
    ids=["data on rank 1", "data on rank 0", "disk full", "not a number"],
)
def test_what_fails_on_one_rank_fails_on_all_in_one_line(
    fault: Fault, code: int, message: str, images: Path, tmp_path: Path
) -> None:
    with forked_ranks([*arguments(images), "--output", "run"], tmp_path, 2, fault) as ranks:
        assert [rank.wait() for rank in ranks] == [code, code], ranks[1].stderr
    (line,) = [line for line in ranks[0].stderr.splitlines() if not line.startswith("warning: ")]
    assert line.startswith(f"egtrain: {message}")
    assert ranks[1].stderr == ""


def test_a_directory_in_use_is_refused_on_all_ranks(images: Path, tmp_path: Path) -> None:
    with (
        RunLock(tmp_path / "run"),
        forked_ranks([*arguments(images), "--output", "run"], tmp_path, 2) as ranks,
    ):
        assert [rank.wait() for rank in ranks] == [2, 2]
    (line,) = ranks[0].stderr.splitlines()
    assert line.startswith(f"egtrain: another run (process {os.getpid()}) is writing to run: ")
    assert ranks[1].stderr == ""


def test_a_restarted_run_does_not_take_over_the_directory_of_another(images: Path, tmp_path: Path) -> None:
    run_here(tmp_path / "run", config_of(images, "seed=1"))
    before = outcome(tmp_path / "run"), (tmp_path / "run/config.yaml").read_bytes()
    with forked_ranks(
        [*arguments(images), "--output", "run"], tmp_path, 2, partial(os.environ.update, TORCHELASTIC_RESTART_COUNT="1")
    ) as ranks:
        assert [rank.wait() for rank in ranks] == [2, 2]
    assert "holds a run already" in ranks[0].stderr
    assert (outcome(tmp_path / "run"), (tmp_path / "run/config.yaml").read_bytes()) == before


@pytest.mark.parametrize(("workers", "ranks", "possible"), [(4, 3, "1, 2, 4"), (12, 0, "1, 2, 3, 4, 6, 12")])
def test_ranks_that_do_not_divide_the_workers_are_refused_with_those_that_do(
    workers: int, ranks: int, possible: str
) -> None:
    with pytest.raises(UsageError, match=f"use --nproc {possible}$"):
        launch.require_dividing(workers, ranks)


def test_torchrun_with_ranks_that_do_not_divide_the_workers_is_refused(images: Path, tmp_path: Path) -> None:
    with forked_ranks([*arguments(images), "--output", "run"], tmp_path, 3) as ranks:
        assert [rank.wait() for rank in ranks] == [2, 2, 2]
    assert ranks[0].stderr == "egtrain: 4 workers cannot be shared by 3 ranks: run on 1, 2, 4 ranks\n"


def test_two_equal_tensors_have_one_digest_and_others_another() -> None:
    import torch

    x = torch.arange(6.0).view(2, 3)
    assert digest(x) == digest(x.t().contiguous().t())
    assert len({digest(x), digest(x.double()), digest(x.view(3, 2)), digest(x + 1e-6), digest(-x * -1 + 0.0)}) == 4
