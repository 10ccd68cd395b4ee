"""The summary of a run says what its numbers depend on besides the settings."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from egtrain.logs.environment import git_commit, hardware


def test_the_hardware_is_named() -> None:
    found = hardware()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert isinstance(found["gpus"], list)
    json.dumps(found, allow_nan=False)


def test_the_commit_is_that_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert git_commit() is None
    git = [
        "git",
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@example.com",
        "-c",
        "core.hooksPath=/dev/null",
    ]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_commit() is None, "a repository without a commit"
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    commit = git_commit()
    assert commit is not None
    assert len(commit) == 40
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None, "no git"


def test_a_git_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "git"
    slow.write_text("#!/bin/sh\nexec /bin/sleep 30\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    started = time.monotonic()
    assert git_commit() is None
    assert time.monotonic() - started < 5
