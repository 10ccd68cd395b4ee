"""A run directory belongs to one run at a time, and is left as it was where nothing was trained."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from egtrain.errors import UsageError
from egtrain.run_directory import LOCK, RunDirectory, RunLock, is_held


def test_a_second_run_in_one_directory_is_refused(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        with pytest.raises(UsageError, match=f"process {os.getpid()}.*choose another directory"):
            RunLock(tmp_path / "run", patience_seconds=0).__enter__()
        with RunLock(tmp_path / "other", patience_seconds=0):
            pass
    with RunLock(tmp_path / "run", patience_seconds=0):
        pass


def test_a_lock_that_its_holder_has_deleted_protects_nothing(tmp_path: Path) -> None:
    """As a run does that could not start; who then waits for the old file would hold no one off."""
    with RunLock(tmp_path):
        (tmp_path / LOCK).unlink()
        with (
            RunLock(tmp_path, patience_seconds=0),
            pytest.raises(UsageError, match=f"process {os.getpid()}"),
        ):
            RunLock(tmp_path, patience_seconds=0).__enter__()


def test_a_file_put_in_place_of_the_lock_that_was_waited_for_is_locked_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def deleted_meanwhile(file: int, operation: int) -> None:
        flock(file, operation)
        monkeypatch.undo()
        (tmp_path / LOCK).unlink()

    monkeypatch.setattr("fcntl.flock", deleted_meanwhile)
    with RunLock(tmp_path), pytest.raises(UsageError, match=f"process {os.getpid()}"):
        RunLock(tmp_path, patience_seconds=0).__enter__()


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    holder = (
        "import fcntl, os, sys\n"
        "file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(UsageError, match="another run"):
            RunLock(tmp_path, patience_seconds=0.1).__enter__()
        process.kill()
        with RunLock(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_run_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="--output"):
        RunLock(tmp_path / "file" / "run").__enter__()


# ---- the claim


def test_a_new_run_takes_no_directory_that_holds_one(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run") as first:
        first.write_config("seed: 1\n")
    with pytest.raises(UsageError, match="holds a run already: go on with --resume"):
        RunDirectory(tmp_path / "run").__enter__()
    with RunLock(tmp_path / "run", patience_seconds=0):  # the refused one holds it no longer
        pass


def test_runs_of_one_name_get_directories_of_their_own(tmp_path: Path) -> None:
    wanted = tmp_path / "run"
    with RunDirectory(wanted, numbered=True) as first, RunDirectory(wanted, numbered=True) as other:
        assert (first.path, other.path) == (wanted, tmp_path / "run-2")
        other.write_config("seed: 2\n")
    with RunDirectory(wanted, numbered=True) as third:  # the first has withdrawn, as it were
        assert third.path == wanted
        third.write_config("seed: 3\n")
    with RunDirectory(wanted, numbered=True) as last:
        assert last.path == tmp_path / "run-3"
        last.withdraw()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-2"]
    assert (tmp_path / "run-2/config.yaml").read_text() == "seed: 2\n"


def test_a_run_whose_settings_have_changed_since_they_were_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"seed: 2\n")
    with pytest.raises(UsageError, match=r"has just changed .*: give the command again"):
        RunDirectory(tmp_path, goes_on_from=b"seed: 1\n").__enter__()
    assert (tmp_path / "config.yaml").read_bytes() == b"seed: 2\n"


def test_a_withdrawn_run_leaves_the_directory_as_it_was(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run") as new:
        new.write_config("seed: 1\n")
        new.withdraw()
    assert not (tmp_path / "run").exists()

    (tmp_path / "config.yaml").write_bytes(b"seed: 1\n")
    with RunDirectory(tmp_path, goes_on_from=b"seed: 1\n") as going_on:
        going_on.write_config("seed: 2\n")
        going_on.withdraw()
    assert (tmp_path / "config.yaml").read_bytes() == b"seed: 1\n"


def test_settings_that_something_was_trained_with_are_not_withdrawn(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"seed: 1\n")
    for content in (b"seed: 1\n", b"seed: 2\n"):
        with RunDirectory(tmp_path, goes_on_from=content) as run:
            run.write_config("seed: 2\n")
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write('{"step": 1}\n')
            run.withdraw()
        assert (tmp_path / "config.yaml").read_bytes() == b"seed: 2\n"


def test_a_directory_is_held_until_the_last_process_that_inherits_its_lock_ends(
    tmp_path: Path,
) -> None:
    with RunDirectory(tmp_path / "run") as run:
        rank = subprocess.Popen(["sleep", "60"], stdin=run.lock_file)
    with rank:
        with pytest.raises(UsageError, match="another run"):
            RunLock(tmp_path / "run", patience_seconds=0.1).__enter__()
        rank.kill()
    with RunLock(tmp_path / "run"):
        pass


def test_looking_at_whether_a_directory_is_held_leaves_the_lock_as_it_is(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    with RunLock(tmp_path):
        assert is_held(tmp_path)
        assert is_held(tmp_path)
    assert not is_held(tmp_path)
    with RunLock(tmp_path, patience_seconds=0):
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"
