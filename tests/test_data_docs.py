"""The page on data: its examples write what its commands read, in the order in which they stand."""

import re
import shlex
from pathlib import Path

import pytest
from helpers import command_line

from egtrain.data.sets import OF_TASK

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_page_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EGTRAIN_DATA", raising=False)
    folder = tmp_path / "FOLDER"
    folder.mkdir()
    words = "".join(
        f"{first} {second} {third}\n"
        for first in "abcdefghijklmnopqrst"
        for second in "abcdefghijklmnopqrst"
        for third in "abcdefghij"
    )
    for part in ("train", "valid", "test"):
        (folder / f"{part}.txt").write_text(words * 10)
        for language in ("en", "de"):
            (folder / f"{part}.{language}").write_text(words)
    commands = 0
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "docs/data.md", "exec"), {})
            continue
        for line in block.splitlines():
            command = shlex.split(line.partition("  #")[0])
            assert command[:2] == ["egtrain", "train"]
            dry = [] if "--dry-run" in command else ["--dry-run"]
            result = command_line(capsys, *command[1:], *dry, "--offline", "--device", "cpu")
            assert (result.code, result.stderr) == (0, ""), line
            commands += 1
    assert commands >= 6


def test_the_page_names_every_public_data_set() -> None:
    named = re.findall(r"`([\w-]+)`", "".join(re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)))
    assert {name for sets in OF_TASK.values() for name in sets} < set(named)
