"""The task files of docs/examples run with the commands of their page, in few steps."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
PAGE = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
SMALL = {
    "character_gpt": "task.context=8 task.width=8 task.layers=1",
    "tabular_regression": "task.width=8",
}
"""The smallest settings of each example."""
FEW_STEPS = "worker_batch_size=4 steps=3 device=cpu threads=1 schedule.shorten_warmup=true"
ALL_IN_ONE = """
import shlex, sys
from egtrain.cli import app
for arguments in sys.argv[1:]:
    app(shlex.split(arguments), standalone_mode=False)
"""
"""Runs several commands in one process, since each takes seconds to start."""

each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


def commands_of(example: Path) -> dict[str, str]:
    """Return the arguments of each command of an example's section of the page, by its name."""
    (section,) = (part for part in PAGE.split("\n## ") if f"`{example.name}`\n" in part)
    (block,) = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    lines = block.replace("\\\n", " ").splitlines()
    return {line.split()[1]: line.partition(" ")[2] for line in lines}


def run(program: list[str], folder: Path) -> str:
    """Run a program as a user does, and return its standard output."""
    result = subprocess.run(
        [sys.executable, *program],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def settings(text: str) -> str:
    return " ".join(f"--set {setting}" for setting in text.split())


@each_example
def test_the_commands_of_the_page_run(example: Path, tmp_path: Path) -> None:
    commands = commands_of(example)
    (tmp_path / example.name).write_bytes(example.read_bytes())
    small = settings(f"{FEW_STEPS} {SMALL[example.stem]}")
    train = re.sub(r"--batch-size \d+", "--batch-size 8", commands["train"])
    output = run(["-m", "egtrain", *shlex.split(f"{train} {small} --json")], tmp_path)
    trained = json.loads(output)
    assert trained["steps"] == 3

    (directory,) = (tmp_path / "runs").iterdir()
    plot = re.sub(r"runs/\S+/cells/\*", str(directory), commands["plot-sharpness"])
    further = [
        f"{commands['eval']} --device cpu --json",
        f"{commands['sweep-batch']} --device cpu --dry-run --no-estimate",
        re.sub(r"--samples \d+", "", plot) + " --samples 8 --metrics line --device cpu",
    ]
    output = run(["-c", ALL_IN_ONE, *further], tmp_path)
    evaluated, _ = json.JSONDecoder().raw_decode(output)
    (metric,) = {name for name in trained["final"]["test"] if name != "loss"}
    assert evaluated[metric] == pytest.approx(trained["final"]["test"][metric], rel=1e-5)
    assert "4 runs" in output
    assert list(tmp_path.glob("runs/*-sharpness/*.png"))


@each_example
def test_an_example_is_short_and_plain(example: Path) -> None:
    text = example.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    tree = ast.parse(text)
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
    }
    assert not [name for name in imported if name and name.startswith("egtrain")]


@each_example
def test_the_command_in_an_example_is_that_of_the_page(example: Path) -> None:
    description = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8"))) or ""
    (shown,) = re.findall(r"^egtrain train .*?$(?<!\\)", description, re.MULTILINE | re.DOTALL)
    words = shlex.split(shown.replace("\\\n", " "))
    assert words[1:] == shlex.split(commands_of(example)["train"])
