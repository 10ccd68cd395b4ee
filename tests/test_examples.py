"""The task files of docs/examples run with the commands of their page, in few steps."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment
from PIL import Image

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
PAGE = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
OPERATORS = ROOT / "tests" / "torchvision_without_operators"
SMALL = {
    "character_gpt": "task.context=8 task.width=8 task.layers=1",
    "finetune_classifier": "task.samples=32 task.width=8 task.layers=1",
    "image_folder": "task.image_size=32",
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


def run(program: list[str], folder: Path, *paths: str) -> str:
    """Run a program as a user does, with further folders of modules; return what it prints."""
    result = subprocess.run(
        [sys.executable, *program],
        cwd=folder,
        env=environment(PYTHONPATH=os.pathsep.join([*paths, environment()["PYTHONPATH"]])),
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def settings(text: str) -> str:
    return " ".join(f"--set {setting}" for setting in text.split())


@each_example
def test_the_commands_of_the_page_run(example: Path, tmp_path: Path) -> None:
    commands = commands_of(example)
    (tmp_path / example.name).write_bytes(example.read_bytes())
    paths = []
    if example.stem == "image_folder":
        folder = os.environ.get("EGTRAIN_TORCHVISION")
        if folder is None:
            pytest.skip(
                "EGTRAIN_TORCHVISION is not set: let it name the FOLDER of pip install --no-deps "
                "--target FOLDER torchvision"
            )
        paths = [str(OPERATORS), folder]
        (draw,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
        fewer = draw.replace('"train", 200', '"train", 50').replace('"val", 50', '"val", 4')
        run(["-c", fewer], tmp_path)
    small = settings(f"{FEW_STEPS} {SMALL[example.stem]}")
    train = re.sub(r"--batch-size \d+", "--batch-size 8", commands["train"])
    (directory,) = re.findall(r"--output (\S+)", train)
    plot = re.sub(r"runs/\S+/cells/\*", directory, commands["plot-sharpness"])
    plot = re.sub(r"--(samples|metrics) \S+", "", plot)
    output = run(
        [
            *("-c", ALL_IN_ONE),
            f"{train} {small} --json",
            f"{commands['eval']} --device cpu --json",
            f"{commands['sweep-batch']} --device cpu --dry-run --no-estimate",
            f"{plot} --samples 4 --metrics trace --device cpu",
        ],
        tmp_path,
        *paths,
    )
    trained, end = json.JSONDecoder().raw_decode(output)
    evaluated, _ = json.JSONDecoder().raw_decode(output[end:].lstrip())
    assert trained["steps"] == 3
    (metric,) = {name for name in trained["final"]["test"] if name != "loss"}
    assert evaluated[metric] == pytest.approx(trained["final"]["test"][metric], rel=1e-5)
    assert "4 runs" in output
    (measured,) = tmp_path.glob("runs/*-sharpness/sharpness.json")
    assert json.loads(measured.read_text())["runs"][0]["checkpoints"][0]["metrics"]["trace"]


def test_the_default_of_the_example_with_images_is_a_resnet_50(tmp_path: Path) -> None:
    folder = os.environ.get("EGTRAIN_TORCHVISION")
    if folder is None:
        pytest.skip("EGTRAIN_TORCHVISION is not set: see above")
    for split in ("train", "val"):
        for number in range(8):
            path = tmp_path / f"imagenet/{split}/{number % 2}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (30 * number, 0, 0)).save(path)
    command = f"train --task {ROOT}/docs/examples/image_folder.py --preset eg --batch-size 4"
    few = settings("worker_batch_size=2 steps=2 device=cpu threads=1 task.image_size=32")
    steps = settings("schedule.warmup_epochs=0 log.tensorboard=false checkpoint.every=2")
    output = run(
        ["-m", "egtrain", *shlex.split(f"{command} {few} {steps} --output run")],
        tmp_path,
        str(OPERATORS),
        folder,
    )
    assert "model(), 25,557,032 parameters" in output


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
