"""What `train` prints of a run before it begins, and `--dry-run` instead."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Result, arguments, command_line

from egtrain.config.files import load_config
from egtrain.header import extrapolation_text, facts_from_data, header_lines, next_lines, run_facts
from egtrain.task_file import load_task_file

Run = Callable[..., Result]


@pytest.fixture
def egtrain_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Return a function that runs a command in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *command: command_line(capsys, *command)


def lines_of(preset: str, *overrides: str, ranks: int = 1) -> dict[str, str]:
    """Return the header by its labels."""
    given = load_config(preset, [*overrides, "precision=fp32"])
    facts = run_facts(given, Path("runs/a"), device="cpu", ranks=ranks, threads=2)
    facts["data"] = f"{given.data.name}, found"
    task: Any = SimpleNamespace(samples=50000, steps_per_epoch=24)
    model = torch.nn.Linear(1234567, 1, bias=False)
    facts |= facts_from_data(given, given, model, task)
    return {
        label: text.strip()
        for line in header_lines(facts)
        for label, text in [(line[:11].strip(), line[11:])]
    }


def test_a_header_names_all_that_a_run_consists_of() -> None:
    assert lines_of("resnet-eg") == {
        "model": "ResNet-20, 1,234,567 parameters",
        "data": "50,000 training images: cifar10, found",
        "batch": "2,048 = 16 workers x 128",
        "optimizer": "SGD, learning rate 3.2 at its peak",
        "shift ζ": "local, 1/16 of the learning rate",
        "runs on": "CPU in fp32, 1 process, 2 threads",
        "rates": "0.1 at step 0, 3.2 at 120, 0.32 at 3,600, 0.032 at 5,400",
        "steps": "7,200, 24 an epoch",
        "output": "runs/a",
    }
    local = lines_of("resnet-postlocal", ranks=4)
    assert local["local phase"] == "from step 3,600 on, weights averaged every 16 steps"
    assert local["runs on"] == "CPU in fp32, 4 processes, 2 threads each"


@pytest.mark.parametrize(
    ("preset", "overrides", "text"),
    [
        ("resnet-sgd", [], "none, plain mini-batch gradients"),
        ("resnet-eg", ["extrapolation.ratio=0.25"], "local, 0.25 of the learning rate"),
        ("resnet-eg", ["extrapolation.rate=0.05"], "local, rate 0.05"),
        (
            "resnet-extragradient",
            [],
            "extragradient, 1/16 of the learning rate, two gradients a step",
        ),
        ("resnet-gaussian", [], "gaussian, 0.05 of the norm of each filter's weights"),
        ("resnet-gaussian", ["extrapolation.scaling=none"], "gaussian, size 0.05"),
        ("resnet-eg", ["workers=1"], "local, the whole learning rate"),
        ("resnet-sam", [], "sam, radius 0.05, two gradients a step"),
        ("resnet-msam", [], "msam, radius 0.3"),
        ("resnet-nesterov", [], "nesterov"),
    ],
)
def test_the_shift_is_told_with_its_size(preset: str, overrides: list[str], text: str) -> None:
    assert extrapolation_text(load_config(preset, overrides)) == text


def test_a_dry_run_and_the_run_print_the_same_and_the_plan_also_what_it_takes(
    egtrain_command: Run, images: Path
) -> None:
    options = [*arguments(images, "steps=4"), "--output", "run"]
    planned = egtrain_command(*options, "--dry-run").stdout.splitlines()
    trained = egtrain_command(*options).stdout.splitlines()
    costs = [line for line in planned if line.startswith(("time ", "memory "))]
    assert len(costs) == 2
    time = re.fullmatch(r"time +about [1-9]\d* s, ([\d.e-]+) s a step", costs[0])
    assert time is not None
    assert float(time[1]) > 0
    assert re.fullmatch(r"memory +about [1-9][\d,]* MiB beside the data", costs[1])
    header = [line for line in planned if line not in costs]
    assert trained[: len(header)] == header
    assert header[-1] == (
        "note        warm-up shortened from 1 to 0.5 epochs (2 steps), since the run ends at step 4"
    )
    assert trained[-1] == "next: egtrain eval run"  # no TensorBoard files are written


def test_with_json_the_header_stands_on_standard_error(egtrain_command: Run, images: Path) -> None:
    result = egtrain_command(*arguments(images, "steps=1"), "--output", "run", "--json")
    assert json.loads(result.stdout)["steps"] == 1
    assert result.stderr.startswith("model       ResNet-8, ")
    assert "next:" not in result.stderr


def test_a_resumed_run_has_no_note_on_what_was_settled_before(
    egtrain_command: Run, images: Path
) -> None:
    options = [*arguments(images, "epochs=1"), "--output", "run"]
    assert "note " in egtrain_command(*options).stdout
    resumed = egtrain_command("train", "--resume", "run", "--epochs", "2", "--allow-changes")
    assert resumed.code == 0
    assert "model  " in resumed.stdout
    assert "note " not in resumed.stdout


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_preset_that_takes_a_part_of_ones_own_data_says_so(
    dry: list[str], egtrain_command: Run, images: Path
) -> None:
    options = [*arguments(images, "epochs=2"), "--output", "run", *dry]
    note = "only 100 of your 150 training images are used; --set data.train_samples=null uses all"
    assert note in egtrain_command(*options, "--set", "data.train_samples=100").stdout
    shutil.rmtree("run", ignore_errors=True)
    assert "of your" not in egtrain_command(*options).stdout


def test_a_directory_with_spaces_is_quoted_in_the_next_commands() -> None:
    assert next_lines(load_config("resnet-eg"), Path("my runs/a")) == [
        "next: egtrain eval 'my runs/a'",
        "      tensorboard --logdir 'my runs'",
    ]


def test_the_next_commands_name_the_task_file_which_runs_only_where_it_is_named(
    tmp_path: Path,
) -> None:
    (tmp_path / "my flowers.py").write_text(
        "def model(): ...\ndef dataset(split): ...\ndef loss(model, batch): ...\n"
    )
    file = load_task_file(tmp_path / "my flowers.py")
    (line, _) = next_lines(load_config("eg", task=file), Path("runs/a"))
    assert line == f"next: egtrain eval runs/a --task '{tmp_path}/my flowers.py'"
