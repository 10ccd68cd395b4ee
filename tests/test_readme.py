"""Everything that the README prints runs as it stands; long commands with a few steps or as a
plan.
"""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import started, write_texts
from typer.testing import CliRunner

from egtrain.cli import app
from egtrain.config.files import preset_families

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PAGES = [
    (Path(__file__).parent.parent / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("train", "presets", "configuration")
]
COMMANDS = [
    line.partition("  #")[0].strip()
    for page in (README, *PAGES)
    for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    for line in block.splitlines()
]
OWN_LOOP = re.search(
    r"^## In your own training loop\n.*?(?=^## )", README, flags=re.DOTALL | re.MULTILINE
)[0]
PLAIN, AROUND, DDP, SECOND_GRADIENT = re.findall(r"```python\n(.*?)```", OWN_LOOP, flags=re.DOTALL)
"""The examples of that section; what the last two compute is held by test_own_loop.py."""
TINY = (
    "--data synthetic --steps 2 --workers 2 --device cpu "
    "--set model.depth=8 --set model.width=4 --set threads=1"
)
"""What makes a preset of the README small enough for a test."""


TINY_TEXT = (
    f"{TINY.partition(' --set')[0]} --set model.layers=1 --set model.width=16 --set threads=1"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with the CIFAR run that the README speaks of, made small."""
    monkeypatch.chdir(tmp_path)
    egtrain(f"train --preset resnet-eg --output runs/resnet-eg {TINY}")
    return tmp_path


def translating(folder: Path) -> None:
    """Make the translating run that the README speaks of, small."""
    egtrain(
        f"train --preset transformer-eg --output runs/transformer-eg {TINY_TEXT} --set "
        "task.subwords=200"
    )


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
        assert re.fullmatch(r"(--nnodes 2 --node-rank [01] )?--nproc-per-node 8 .*", launcher)
        arguments += " --nproc 8"
    if arguments.startswith(
        ("train --preset quickstart-lstm", "train --preset quickstart-transformer")
    ):
        arguments += f" {TINY_TEXT}"
    elif arguments.startswith("eval runs/transformer-eg"):
        translating(folder)
    elif arguments.startswith("train --preset quickstart"):
        arguments += f" {TINY}"
    elif arguments.startswith("plot-sharpness"):
        for name in ("sgd", "eg"):
            egtrain(f"train --preset quickstart --output runs/{name} {TINY}")
        arguments = re.sub(r" --samples \d+", "", arguments) + " --samples 8 --device cpu"
        arguments += "" if "--metrics" in arguments else " --metrics trace,line"
    elif arguments.startswith("bench"):
        arguments = (
            re.sub(r" --rounds \d+", "", arguments) + " --rounds 2 --data synthetic --device cpu"
        )
        arguments += (
            " --set model.depth=8 --set model.width=2 --set worker_batch_size=4 --set threads=1"
        )
    elif arguments.startswith("sweep-batch"):
        # The plan of a real one needs torch and data, here the embedded ones.
        arguments += (
            " --dry-run --no-estimate --data synthetic --device cpu --set data.train_samples=null"
        )
    elif arguments.endswith("text:FOLDER"):
        (folder / "FOLDER").mkdir()
        write_texts(folder / "FOLDER", words=93, pairs=1)
        arguments += f" --dry-run --set task.bptt=5 {TINY_TEXT.removeprefix('--data synthetic ')}"
        arguments += " --batch-size 2"
    elif arguments.startswith("train --preset"):
        # The plan of the real thing: it needs neither the data nor eight GPUs.
        arguments += "" if "--dry-run" in arguments else " --dry-run"
        arguments += " --device cpu --offline"
    assert egtrain(arguments)


def test_settings_of_the_readme_are_accepted(folder: Path) -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    settings = [
        c
        for c in re.findall(r"`([^`]+)`", prose)
        if re.match(r"--(set|batch-size|workers|seed) ", c)
    ]
    assert len(settings) >= 4
    for setting in settings:
        egtrain(f"train --preset resnet-eg --dry-run --offline --device cpu {setting}")


def test_python_of_the_readme_runs(folder: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", README.replace(OWN_LOOP, ""), flags=re.DOTALL)
    assert len(examples) >= 1
    for example in examples:
        exec(compile(example, "README.md", "exec"), {"torch": torch})


def test_a_loop_of_the_readme_trains_and_saves_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(PLAIN, "README.md", "exec"), names)
    weight = names["network"][0].weight
    before = weight.detach().clone()
    exec(compile(AROUND, "README.md", "exec"), names)
    assert not torch.equal(weight, before)
    for name, state in torch.load("training.pt", weights_only=True).items():
        names[name].load_state_dict(state)


def test_ddp_of_the_readme_runs_under_torchrun(tmp_path: Path) -> None:
    (arguments,) = re.findall("# torchrun (.*)", DDP)
    assert arguments == "--nproc-per-node 2 this_file.py"
    (tmp_path / "this_file.py").write_text(DDP, encoding="utf-8")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        *shlex.split(arguments),
    ]
    with started(torchrun, tmp_path, OMP_NUM_THREADS="1", PYTHONWARNINGS="error") as process:
        output = "".join(process.communicate(timeout=120))
    assert process.returncode == 0, output


def test_variants_of_the_table_have_presets_of_that_kind() -> None:
    rows = re.findall(
        r"^\| `(resnet-[\w-]+)` \| `([\w-]+)` \|.*\| (\d) \|$", README, flags=re.MULTILINE
    )
    assert len(rows) == 10
    for preset, name, gradients in rows:
        shown = egtrain(f"presets {preset}")
        assert re.search(rf"^extrapolation:\n  name: {name}$", shown, flags=re.MULTILINE), preset
        assert gradients == ("2" if name in ("extragradient", "sam") else "1")


def test_every_variant_stands_in_a_table() -> None:
    cells = re.findall(r"^\| (`resnet-[^|]*`) \|", README, flags=re.MULTILINE)
    named = [preset for cell in cells for preset in re.findall(r"`([\w-]+)`", cell)]
    assert sorted(named) == sorted(f"resnet-{variant}" for variant in preset_families()["resnet"])


def test_every_family_is_named() -> None:
    for family in preset_families():
        assert f"`{family}`" in README or f"`{family}-…`" in README
