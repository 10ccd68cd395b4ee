"""Everything that the README prints runs as it stands; long commands with a few steps or as a plan."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from egtrain.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
]
TINY = "--data synthetic --steps 2 --workers 2 --device cpu --set model.depth=8 --set model.width=4 --set threads=1"
"""What makes a preset of the README small enough for a test."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with the CIFAR run that the README speaks of, made small."""
    monkeypatch.chdir(tmp_path)
    egtrain(f"train --preset resnet-eg --output runs/resnet-eg {TINY}")
    return tmp_path


def egtrain(arguments: str) -> str:
    result = CliRunner().invoke(app, shlex.split(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_every_kind_of_command_is_found() -> None:
    assert sum(command.startswith("egtrain train") for command in COMMANDS) >= 6
    assert sum(command.startswith("pip install -c constraints.txt") for command in COMMANDS) == 2


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match("egtrain|torchrun", c)])
def test_command_of_the_readme_runs(command: str, folder: Path) -> None:
    program, _, arguments = command.partition(" ")
    if program == "torchrun":
        launcher, _, arguments = arguments.partition("-m egtrain ")
        assert launcher == "--nproc-per-node 8 "
        arguments += " --nproc 8"
    if arguments.startswith("train --preset quickstart"):
        arguments += f" {TINY}"
    elif arguments.startswith("train --preset"):
        # The plan of the real thing: it needs neither the data nor eight GPUs.
        arguments += "" if "--dry-run" in arguments else " --dry-run"
        arguments += " --device cpu --offline"
    assert egtrain(arguments)


def test_settings_of_the_readme_are_accepted(folder: Path) -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    settings = [c for c in re.findall(r"`([^`]+)`", prose) if re.match(r"--(set|batch-size|workers|seed) ", c)]
    assert len(settings) >= 4
    for setting in settings:
        egtrain(f"train --preset resnet-eg --dry-run --offline --device cpu {setting}")


def test_python_of_the_readme_runs(folder: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) == 2
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    names = {
        "torch": torch,
        "model": model,
        "loss_function": torch.nn.functional.cross_entropy,
        "loader": [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(3)],
    }
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
    assert not torch.equal(model.weight, before)


def test_variants_of_the_table_have_presets_of_that_kind() -> None:
    rows = re.findall(r"^\| `(resnet-[\w-]+)` \| `([\w-]+)` \|.*\| (\d) \|$", README, flags=re.MULTILINE)
    assert len(rows) == 8
    for preset, name, gradients in rows:
        shown = egtrain(f"presets {preset}")
        assert re.search(rf"^extrapolation:\n  name: {name}$", shown, flags=re.MULTILINE), preset
        assert gradients == ("2" if name in ("fresh", "sam") else "1")
