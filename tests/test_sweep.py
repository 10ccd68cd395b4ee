"""Batch-size sweeps: the plan and its one rule, cells that run once, and what is read off them."""

import csv
import io
import itertools
import json
import math
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    Forked,
    Result,
    command_line,
    environment,
    outcome,
    run_here,
    settings,
    steps_logged,
    wait_until,
)
from rich.console import Console

from egtrain.config.files import load_config
from egtrain.config.schema import Config, config_to_yaml
from egtrain.errors import EgtrainError, InterruptedRun, UsageError
from egtrain.figures import save_figure
from egtrain.sweep import execution
from egtrain.sweep.cells import Folder, Status
from egtrain.sweep.display import Display
from egtrain.sweep.execution import Speed, run_cells
from egtrain.sweep.picture import picture_of
from egtrain.sweep.plan import Cell, Facts, Plan, facts_from_data, make_plan
from egtrain.sweep.report import print_plan, print_results, write_results
from egtrain.sweep.request import FIRST_FACTORS, Request, checked_presets, settled_on_device
from egtrain.sweep.results import Merit, Results, read_results
from egtrain.sweep.search import continued, next_factors
from egtrain.tasks import ACCURACY

SAMPLES = 1024


def facts_of(config: Config) -> Facts:
    """Return what 1,024 samples make of a configuration."""
    samples = SAMPLES - config.data.validation
    steps_per_epoch = samples // config.batch_size
    steps = config.steps or config.epochs * steps_per_epoch
    second = range(0)
    if config.extrapolation.name in ("extragradient", "sam"):
        second = range(
            0, round((config.extrapolation.until or 1) * steps), config.extrapolation.every
        )
    held_out = config.data.validation > 0 or config.task.name != "image"
    return Facts(samples, steps_per_epoch, steps, second, ACCURACY, held_out)


def plan_of(
    presets: Sequence[str] = ("quickstart", "quickstart-sgd"),
    batch_sizes: Sequence[int] = (64, 256),
    seeds: int = 1,
    *,
    facts: Callable[[Config], Facts] = facts_of,
    **further: Any,
) -> Plan:
    # What the tests count on is set here, so that the presets can change.
    given = ("epochs=10", "optimizer.lr=1.6", *further.pop("settings", ()), "device=cpu")
    request = Request(tuple(presets), tuple(batch_sizes), seeds, settings=given, **further)
    return make_plan(request, checked_presets(request), facts)


def cell_of(plan: Plan, preset: str, batch_size: int, **wanted: object) -> Cell:
    (cell,) = [
        cell
        for cell in plan.cells
        if (cell.preset, cell.batch_size) == (preset, batch_size)
        and all(getattr(cell, key) == value for key, value in wanted.items())
    ]
    return cell


def names_of(plan: Plan) -> set[str]:
    return {cell.name for cell in plan.cells}


# ---- the plan


def test_a_larger_batch_has_more_workers_and_its_rates_follow_it() -> None:
    plan = plan_of(batch_sizes=(1024, 64))
    assert plan.batch_sizes == (64, 1024)
    small, large = cell_of(plan, "quickstart", 64), cell_of(plan, "quickstart", 1024)
    for cell, workers in ((small, 2), (large, 32)):
        assert (cell.config.workers, cell.config.worker_batch_size, cell.config.batch_size) == (
            workers,
            32,
            cell.batch_size,
        )
        # The rate, 1.6, is for the preset's own batch of 512.
        assert cell.learning_rate == pytest.approx(1.6 * cell.batch_size / 512)
        # The inner rate is that of a single worker's batch, whatever B is.
        assert cell.length == ("ratio", 1 / workers)
        assert cell.config.epochs == 10
        assert (cell.config.schedule.warmup_epochs, cell.config.schedule.warmup_from) == (2, 0.1)
    assert small.gradient_evaluations == large.gradient_evaluations == 10 * SAMPLES


def test_a_worker_batch_can_grow_instead() -> None:
    cell = cell_of(plan_of(batch_sizes=(64, 256), grow="worker-batch"), "quickstart", 256)
    assert (cell.config.workers, cell.config.worker_batch_size) == (16, 16)
    assert cell.length == ("ratio", 1 / 16)


@pytest.mark.parametrize(("scaling", "growth"), [("linear", 4.0), ("sqrt", 2.0), ("none", 1.0)])
def test_the_learning_rate_grows_as_asked(scaling: Any, growth: float) -> None:
    plan = plan_of(batch_sizes=(256, 1024), scaling=scaling)
    rates = [cell_of(plan, "quickstart", batch_size).learning_rate for batch_size in (256, 1024)]
    assert rates[1] / rates[0] == pytest.approx(growth)


def test_a_preset_with_a_base_batch_size_keeps_its_own_scaling() -> None:
    settings = ("optimizer.base_batch_size=64",)
    plan = plan_of(batch_sizes=(64, 256), settings=settings)
    assert [cell.learning_rate for cell in plan.cells[::2]] == pytest.approx([1.6, 6.4])


def test_a_factor_multiplies_the_rate_and_the_start_of_its_warm_up() -> None:
    plan = plan_of(batch_sizes=(512,), rate_factors=(0.5, 1.0))
    half = cell_of(plan, "quickstart", 512, rate_factor=0.5)
    assert (half.learning_rate, half.config.schedule.warmup_from) == (0.8, 0.05)
    # It is a ratio of the learning rate, so the inner rate is halved too.
    assert half.length == ("ratio", 1 / 16)


def test_the_ratio_grid_scales_whatever_says_how_far_a_preset_goes(tmp_path: Path) -> None:
    noise = tmp_path / "noise.yaml"
    noise.write_text("inherits: [quickstart, variant/gaussian]\nextrapolation: {size: 0.1}\n")
    plan = plan_of(["quickstart", "quickstart-sgd", str(noise)], (512,), length_factors=(0.5, 1.0))
    lengths = [(cell.preset, cell.length) for cell in plan.cells]
    assert lengths == [
        ("quickstart", ("ratio", 1 / 32)),
        ("quickstart", ("ratio", 1 / 16)),
        ("quickstart-sgd", None),  # once: there is nothing to choose
        ("noise", ("size", 0.05)),
        ("noise", ("size", 0.1)),
    ]


def test_a_grid_holds_out_a_tenth_for_validation_and_says_so() -> None:
    plan = plan_of(rate_factors=(0.5, 1.0))
    assert {cell.config.data.validation for cell in plan.cells} == {102}
    assert any("102 samples" in note and "922" in note for note in plan.notes)
    assert {
        cell.config.data.validation
        for cell in plan_of(rate_factors=(1.0, 2.0), validation=24).cells
    } == {24}
    assert {cell.config.data.validation for cell in plan_of().cells} == {0}


def test_equal_steps_have_equally_many_warm_up_steps() -> None:
    # 384 does not divide the data: its epochs are an eighth of those of 64, not a sixth.
    plan = plan_of(batch_sizes=(64, 256, 384), settings=["steps=100"])
    warmups = {
        c.config.schedule.warmup_epochs * facts_of(c.config).steps_per_epoch for c in plan.cells
    }
    assert warmups == {32}
    assert any("equal steps and unequal cost" in note for note in plan.notes)


def test_what_an_epoch_leaves_out_is_said() -> None:
    (note,) = [note for note in plan_of(batch_sizes=(64, 384)).notes if "left out" in note]
    assert "256 at 384, of 1,024 samples" in note
    assert not [note for note in plan_of(batch_sizes=(64, 512)).notes if "left out" in note]


def test_the_precision_is_settled_once_for_all_machines() -> None:
    for native in ("bf16", "fp32"):
        cells = plan_of(settings=["precision=auto"], native_precision=native).cells
        assert {cell.config.precision for cell in cells} == {native}
        assert all(f"precision={native}" in cell.settings for cell in cells)
    assert {
        c.config.precision
        for c in plan_of(settings=["precision=fp32"], native_precision="bf16").cells
    } == {"fp32"}


def test_runs_are_evaluated_often_enough_for_curves() -> None:
    assert {
        c.config.evaluate_every
        for c in plan_of(settings=["epochs=100", "evaluate_every=100"]).cells
    } == {100}
    assert {c.config.evaluate_every for c in plan_of(settings=["epochs=10"]).cells} == {1}
    # With equal steps an epoch of a small batch can be longer than the whole run.
    for cell in plan_of(settings=["steps=40"], batch_sizes=(32, 512)).cells:
        assert cell.config.evaluate_every * facts_of(cell.config).steps_per_epoch == pytest.approx(
            2
        )


def test_a_grid_of_texts_is_selected_on_their_own_validation_part(tmp_path: Path) -> None:
    plan, folder = plan_of(["quickstart-lstm"], (32, 64), rate_factors=(0.5, 1.0)), Folder(tmp_path)
    assert {cell.config.data.validation for cell in plan.cells} == {0}
    swept(plan, folder, lambda cell: [cell.rate_factor], lambda cell: 0.7)
    results = read_results(plan, folder, target=None, within_percent=1)
    assert [row.rate_factor for row in results.rows] == [1.0, 1.0]
    assert plan.watched_split == "validation"
    write_results(results, tmp_path)
    assert "validation_accuracy" in (tmp_path / "results.csv").read_text().splitlines()[0]


def test_a_preset_that_says_how_its_rate_grows_is_taken_at_its_word() -> None:
    # Its rate is for its own batch of 64.
    rates = [cell.learning_rate for cell in plan_of(["quickstart-transformer"], (64, 1024)).cells]
    assert rates == pytest.approx([1.6, 6.4])


def test_only_batches_of_the_sweep_need_to_fit_the_data() -> None:
    def facts(config: Config) -> Facts:
        assert config.batch_size <= 64, "the preset's own batch, which nobody asked for"
        return facts_of(config)

    assert plan_of(batch_sizes=(32, 64), rate_factors=(0.5, 1.0), facts=facts).cells


def test_a_cell_is_what_its_command_makes() -> None:
    plan = plan_of(rate_factors=(0.5, 1.0), seeds=2)
    commands = plan.as_json(Path("cells"))["commands"]
    for cell in plan.cells:
        words = shlex.split(commands[cell.name])
        assert words[:2] == ["egtrain", "train"]
        assert words[-2:] == ["--output", f"cells/{cell.name}"]
        pairs = [value for option, value in itertools.pairwise(words) if option == "--set"]
        assert load_config(words[words.index("--preset") + 1], pairs) == cell.config
        # A number of threads that depended on the machine or on --jobs would change the order of
        # sums.
        assert cell.config.threads == 1
    assert len({cell.name for cell in plan.cells}) == len(plan.cells) == 16


@pytest.fixture
def egtrain_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Return a function that runs a command in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    return lambda *command: command_line(capsys, *command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--preset quickstartt --batch-sizes 64",
            "unknown preset 'quickstartt'; did you mean 'quickstart'",
        ),
        ("--batch-sizes 64", "--preset is missing: add --preset NAME|FILE"),
        ("--preset quickstart", "--batch-sizes is missing: add --batch-sizes B,B,..."),
        ("--preset quickstart --batch-sizes ''", "--batch-sizes has no values"),
        (
            "--preset quickstart --batch-sizes 64,100",
            "100 is not a multiple of a worker's batch of 32 in quickstart:",
        ),
        ("--preset quickstart --batch-sizes 8", "use 32 or 64"),
        (
            "--preset quickstart --batch-sizes 72 --grow worker-batch",
            "72 is not a multiple of the 16 workers in",
        ),
        (
            "--preset quickstart --batch-sizes 64,x",
            "--batch-sizes takes whole numbers, such as 256,1024, not '64,x'",
        ),
        ("--preset quickstart --batch-sizes 64,64", "--batch-sizes names 64 twice"),
        ("--preset quickstart --batch-sizes 0", "--batch-sizes must be at least 1, not 0"),
        (
            "--preset quickstart --preset quickstart --batch-sizes 64",
            "--preset names quickstart twice",
        ),
        (
            "--preset quickstart --preset x/quickstart.yaml --batch-sizes 64",
            "two presets are called quickstart",
        ),
        ("--preset quickstart --batch-sizes 64 --seeds 0", "--seeds must be at least 1, not 0"),
        (
            "--preset quickstart --batch-sizes 64 --lr-grid ,",
            "--lr-grid takes numbers, such as 0.5,1,2, or auto, not ','",
        ),
        ("--preset quickstart --batch-sizes 64 --lr-grid ''", "--lr-grid has no values"),
        ("--preset quickstart --batch-sizes 64 --lr-grid 1,0", "--lr-grid takes positive factors"),
        (
            "--preset quickstart --batch-sizes 64 --lr-grid auto,1",
            "--lr-grid takes numbers, such as 0.5,1,2, or auto, not 'auto,1'",
        ),
        (
            "--preset quickstart --batch-sizes 64 --lr-grid auto --validation 0",
            "leave out --validation 0",
        ),
        ("--preset quickstart --batch-sizes 64 --ratio-grid 1,-1", "--ratio-grid takes factors"),
        (
            "--preset quickstart-sgd --batch-sizes 64 --ratio-grid 1,2",
            "--ratio-grid has nothing to scale",
        ),
        (
            "--preset quickstart --batch-sizes 64 --lr-grid 1,2 --validation 0",
            "leave out --validation 0",
        ),
        (
            "--preset quickstart --batch-sizes 64 --epochs 1 --steps 1",
            "--epochs and --steps exclude each other",
        ),
        (
            "--preset quickstart --batch-sizes 64 --set optimizer.lr_scaling=none",
            "use --lr-scaling",
        ),
        ("--preset quickstart --batch-sizes 64 --set optimzer.lr=1", "did you mean 'optimizer.lr'"),
        (
            "--preset quickstart --preset resnet-eg --batch-sizes 128",
            "resnet-eg has another data than quickstart",
        ),
        ("--preset quickstart --batch-sizes 64 --within -1", "--within takes a percentage"),
        ("--preset quickstart --batch-sizes 64,8224", "at batch size 8224, a batch of 257 x 32"),
        (
            "--preset quickstart --batch-sizes 64 --epochs 2",
            "takes 256 steps of 256, and the learning rate ends",
        ),
        (
            "--preset quickstart --batch-sizes 64 --steps 300 --set schedule.decay=step "
            "--set 'schedule.milestones=[0.5]'",
            "warm-up takes 256 steps of 300, and the learning rate falls at 150: "
            "lower schedule.warmup_epochs",
        ),
        (
            "--preset quickstart-sgd --preset steps.yaml --batch-sizes 64",
            "one of quickstart-sgd and steps counts steps, the other epochs: give --epochs",
        ),
        (
            "--preset quickstart --batch-sizes 64 --jobs s",
            "--jobs must be a number of processes or auto, not 's'",
        ),
        (
            "--preset quickstart --batch-sizes 64 --output run",
            "run holds a run: choose another --output",
        ),
    ],
)
def test_a_wrong_request_is_one_line_with_the_fix_and_starts_nothing(
    options: str, message: str, egtrain_command: Callable[..., Result], tmp_path: Path
) -> None:
    for name, text in (
        ("x/quickstart.yaml", "inherits: [quickstart]\n"),
        ("run/config.yaml", ""),
        ("steps.yaml", "inherits: [quickstart]\nsteps: 100\n"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    result = egtrain_command("sweep-batch", *shlex.split(options))
    assert (result.code, result.stdout) == (2, "")
    assert message in result.line
    assert not list(tmp_path.rglob("sweep.json"))


# ---- running the cells, with processes that do nothing


class FakeCells:
    """Takes the place of `start_cell`: writes what a run would leave and starts a process that only
    ends.
    """

    def __init__(self) -> None:
        self.started: list[str] = []
        self.gpus: dict[str, str | None] = {}
        self.codes: dict[str, int] = {}
        self.seconds = "0"
        self.value: Callable[[Cell], float] = lambda cell: 0.6

    def __call__(self, cell: Cell, folder: Folder, gpu: str | None) -> "ShellProcess":
        self.started.append(cell.name)
        self.gpus[cell.name] = gpu
        code = self.codes.get(cell.name, 0)
        write_run(
            cell, folder, [0.5, self.value(cell)], finished=code == 0 and float(self.seconds) < 1
        )
        folder.log(cell).write_text(f"egtrain: it went wrong with {code}\n")
        shell = f"trap 'kill $!; exit 75' TERM; sleep {self.seconds} & wait; exit {code}"
        return ShellProcess(shell)


class ShellProcess:
    """What the sweep uses of a process."""

    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(["sh", "-c", command])
        self.terminate, self.kill, self.join = (
            self._process.terminate,
            self._process.kill,
            self._process.wait,
        )

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()


def write_run(
    cell: Cell, folder: Folder, curve: Sequence[float], *, finished: bool = True, test: float = 0.7
) -> None:
    """Write the files of a run; the curve is evenly spaced over it."""
    run = folder.run(cell)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(config_to_yaml(cell.config))
    split = (
        "validation" if cell.config.data.validation or cell.config.task.name != "image" else "test"
    )
    lines: list[dict[str, Any]] = [
        {
            "step": cell.steps,
            "split": "train",
            "accuracy": 0.9,
            "noise_scale": 100.0 * cell.seed + 200,
        }
    ]
    lines += [
        {"step": cell.steps * (number + 1) // len(curve), "split": split, "accuracy": value}
        for number, value in enumerate(curve)
    ]
    text = "".join(json.dumps({**line, "wall": {"seconds": 1.0}}) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text)
    summary = {
        "final": {
            split: {"accuracy": curve[-1], "loss": 1.0},
            "test": {"accuracy": test, "loss": 1.0},
        },
        "steps": cell.steps,
        "samples": cell.steps * cell.batch_size,
        "gradient_evaluations": cell.gradient_evaluations,
    }
    if finished:
        (run / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCells:
    cells = FakeCells()
    monkeypatch.setattr(execution, "start_cell", cells)
    return cells


def run(
    plan: Plan, folder: Folder, *, jobs: int = 1, gpus: Sequence[str] = (), retry: bool = False
) -> None:
    folder.claim(plan)
    run_cells(plan, folder, jobs=jobs, gpus=gpus, retry=retry, stream=io.StringIO())


def test_a_finished_cell_is_never_repeated(fake: FakeCells, tmp_path: Path) -> None:
    plan, folder = plan_of(seeds=2), Folder(tmp_path / "sweep")
    run(plan, folder, jobs=3)
    assert sorted(fake.started) == sorted(cell.name for cell in plan.cells)
    fake.started.clear()
    (folder.run(plan.cells[3]) / "summary.json").unlink()
    run(plan, folder)
    assert fake.started == [plan.cells[3].name]


def test_a_failed_cell_is_recorded_and_repeated_only_when_asked(
    fake: FakeCells, tmp_path: Path
) -> None:
    plan, folder = plan_of(), Folder(tmp_path / "sweep")
    bad, worse = plan.cells[0], plan.cells[2]
    fake.codes = {bad.name: 4, worse.name: 1}
    run(plan, folder)
    assert [folder.status(cell) for cell in plan.cells] == ["diverged", "done", "failed", "done"]
    assert folder.read_failure(bad) == {
        "status": "diverged",
        "exit_code": 4,
        "message": "it went wrong with 4",
    }
    with pytest.raises(
        EgtrainError, match=f"2 of 4 cells failed \\({bad.name}, {worse.name}\\).*--retry"
    ) as failure:
        execution.require_success(plan, folder, names_of(plan))
    assert failure.value.exit_code == 1
    results = read_results(plan, folder, target=None, within_percent=1)
    text = printed(results)
    assert f"{bad.name}: diverged: it went wrong with 4" in text
    assert "0, 1 failed" in text
    fake.started.clear()
    run(plan, folder)
    assert fake.started == []
    fake.codes = {}
    run(plan, folder, retry=True)
    assert fake.started == [bad.name, worse.name]
    execution.require_success(plan, folder, names_of(plan))


def test_the_exit_code_goes_by_what_the_table_shows(fake: FakeCells, tmp_path: Path) -> None:
    plan, folder = plan_of(), Folder(tmp_path / "sweep")
    mended, infinite = plan.cells[0], plan.cells[1]
    fake.codes = {mended.name: 1}
    run(plan, folder)
    write_run(mended, folder, [0.5])  # by `egtrain train --resume`
    execution.require_success(plan, folder, names_of(plan))
    summary = folder.run(infinite) / "summary.json"
    summary.write_text(summary.read_text().replace("0.7", "null"))
    with pytest.raises(EgtrainError, match=f"1 of 4 cells failed \\({infinite.name}\\)"):
        execution.require_success(plan, folder, names_of(plan))
    text = printed(read_results(plan, folder, target=None, within_percent=1))
    assert f"{infinite.name}: diverged: a final metric is not a number" in text
    run(plan, folder, retry=True)
    assert folder.status(infinite) is Status.done


def test_so_many_cells_run_at_a_time_and_each_has_a_gpu_of_its_own(
    fake: FakeCells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder = plan_of(batch_sizes=(64, 128, 256)), Folder(tmp_path / "sweep")
    fake.seconds = "0.1"
    alive: list[int] = []
    together: list[int] = []

    class Watched(Display):
        def started(self, cell: Cell) -> None:
            alive.append(1)
            together.append(len(alive))

        def ended(self, cell: Cell, status: Status) -> None:
            alive.pop()

    monkeypatch.setattr(execution, "Display", Watched)
    run(plan, folder, jobs=2, gpus=["3", "5"])
    assert max(together) == 2
    assert set(fake.gpus.values()) == {"3", "5"}


@pytest.mark.parametrize(
    ("further", "difference"),
    [
        ({"settings": ["optimizer.lr=0.8"]}, "presets quickstart optimizer.lr: 1.6 -> 0.8"),
        ({"scaling": "sqrt"}, "lr_scaling quickstart: linear -> sqrt"),
        ({"facts": lambda config: replace(facts_of(config), data="other")}, "data:  -> other"),
    ],
)
def test_a_changed_sweep_in_the_same_folder_is_refused(
    further: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    folder = Folder(tmp_path / "sweep")
    folder.claim(plan_of())
    folder.claim(plan_of())
    with pytest.raises(
        UsageError, match=f"holds another sweep .*{difference}.*choose another --output"
    ):
        folder.claim(plan_of(**further))


def test_a_sweep_in_the_same_folder_may_grow_and_shrink(fake: FakeCells, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "sweep")
    steps: list[tuple[dict[str, Any], int]] = [
        ({"presets": ["quickstart"], "batch_sizes": (64,)}, 2),
        ({"presets": ["quickstart"], "batch_sizes": (64, 256)}, 2),
        ({"batch_sizes": (64, 256)}, 4),
        ({"seeds": 2}, 8),
        ({"seeds": 1}, 0),
        ({"rate_factors": (2.0, 0.5, 1.0)}, 4),
        ({"presets": ["quickstart"]}, 0),
    ]
    for changes, new in steps:
        fake.started.clear()
        plan = plan_of(**{"rate_factors": (0.5, 1.0), "validation": 100, **changes})
        run(plan, folder)
        assert len(fake.started) == new
        assert {folder.status(cell) for cell in plan.cells} == {Status.done}
    # Of what was left out meanwhile it still knows the settings.
    with pytest.raises(UsageError, match=r"presets quickstart-sgd optimizer.lr"):
        folder.claim(
            plan_of(
                ["quickstart-sgd"],
                rate_factors=(0.5, 1.0),
                validation=100,
                settings=["optimizer.lr=1"],
            )
        )
    commands = json.loads((folder.path / "sweep.json").read_text())["commands"]
    assert len(commands) == 20


def test_a_finished_sweep_of_a_gpu_is_read_where_there_is_none(
    egtrain_command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = shlex.split(
        "sweep-batch --preset quickstart-sgd --batch-sizes 64 --device cuda --output sweep"
    )
    result = egtrain_command(*options)
    assert (result.code, result.stdout) == (2, "")
    assert "no CUDA device was found: use --device cpu" in result.line
    assert not (tmp_path / "sweep").exists()
    request, presets = settled_on_device(
        Request(("quickstart-sgd",), (64,), 1, settings=("device=cuda",))
    )
    plan, folder = make_plan(request, presets, facts_from_data()), Folder(tmp_path / "sweep")
    folder.claim(plan)
    # A record of a failure is kept while nothing can run again.
    folder.note_end(plan.cells[0], 1)
    for more in ([], ["--retry"]):
        result = egtrain_command(*options, *more)
        assert result.code == (2 if more else 1)
        assert ("no CUDA device was found" in result.line) == bool(more)
        assert folder.status(plan.cells[0]) is Status.failed
    folder.failure(plan.cells[0]).unlink()
    result = egtrain_command(*options)
    assert result.code == 2
    assert "no CUDA device was found" in result.line
    write_run(plan.cells[0], folder, [0.5, 0.6])
    result = egtrain_command(*options)
    assert result.code == 0
    assert "70.00 %" in result.stdout
    assert (tmp_path / "sweep" / "sweep.png").exists()


def test_what_differs_only_in_cells_is_refused_too(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "sweep")
    folder.claim(plan_of(settings=["steps=40"], batch_sizes=(64, 256)))
    # The warm-up has as many steps as that of the smallest batch.
    with pytest.raises(
        UsageError, match=r"holds another sweep \(the configurations of its cells\)"
    ):
        folder.claim(plan_of(settings=["steps=40"], batch_sizes=(32, 64, 256)))


def test_another_run_in_the_place_of_a_cell_is_refused(fake: FakeCells, tmp_path: Path) -> None:
    plan, folder = plan_of(), Folder(tmp_path / "sweep")
    run(plan, folder)
    write_run(replace(plan.cells[1], config=plan.cells[0].config), folder, [0.5])
    with pytest.raises(
        UsageError, match=r"holds another run \(.*extrapolation.name: none -> local"
    ):
        run(plan, folder)


def test_a_signal_stops_the_cells_and_the_next_start_goes_on(
    fake: FakeCells, tmp_path: Path
) -> None:
    plan, folder = plan_of(), Folder(tmp_path / "sweep")
    fake.seconds = "30"
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    begun = time.monotonic()
    with pytest.raises(
        InterruptedRun, match="with 0 of 4 cells finished: the same command goes on"
    ) as stopped:
        run(plan, folder, jobs=2)
    assert stopped.value.exit_code == 75
    assert time.monotonic() - begun < 10
    assert len(fake.started) == 2
    fake.seconds = "0"
    run(plan, folder)
    assert {folder.status(cell) for cell in plan.cells} == {Status.done}


# ---- what is read off them


def swept(
    plan: Plan,
    folder: Folder,
    curve_of: Callable[[Cell], Sequence[float]],
    test_of: Callable[[Cell], float],
) -> None:
    folder.claim(plan)
    for cell in plan.cells:
        write_run(cell, folder, curve_of(cell), test=test_of(cell))


def printed(results: Results) -> str:
    console = Console(width=200, highlight=False)
    with console.capture() as captured:
        print_results(results, console)
    return captured.get()


def test_rows_hold_mean_deviation_and_gap_to_the_smallest_batch(tmp_path: Path) -> None:
    plan, folder = plan_of(batch_sizes=(64, 256, 512), seeds=3), Folder(tmp_path)
    values = {64: 0.8, 256: 0.795, 512: 0.7}
    swept(
        plan,
        folder,
        lambda cell: [0.4, 0.5, 0.6],
        lambda cell: values[cell.batch_size] + 0.01 * cell.seed,
    )
    results = read_results(plan, folder, target=None, within_percent=1)
    rows = results.rows_of("quickstart")
    assert [row.mean for row in rows] == pytest.approx([0.81, 0.805, 0.71])
    assert [row.standard_deviation for row in rows] == pytest.approx([0.01] * 3)
    assert [row.gap for row in rows] == [None, pytest.approx(-0.005), pytest.approx(-0.1)]
    assert results.largest_batch_within("quickstart") == 256
    assert replace(results, within_percent=0.1).largest_batch_within("quickstart") == 64
    assert replace(results, within_percent=50).largest_batch_within("quickstart") == 512
    text = printed(results)
    assert "81.00 ± 1.00 %" in text
    assert "-10.00" in text
    assert (
        "Largest batch within 1 % of the smallest batch's test accuracy: quickstart 256, "
        "quickstart-sgd 256." in text
    )
    assert results.noise_scale == pytest.approx((200, 300, 400))


def test_a_batch_that_a_seed_did_not_survive_is_as_good_as_none(tmp_path: Path) -> None:
    plan, folder = plan_of(["quickstart"], (64, 256, 512), seeds=3), Folder(tmp_path)
    swept(plan, folder, lambda cell: [0.4, 0.5, 0.6], lambda cell: 0.8)
    lost = cell_of(plan, "quickstart", 512, seed=2)
    (folder.run(lost) / "summary.json").unlink()
    folder.note_end(lost, 4)
    results = read_results(plan, folder, target=0.5, within_percent=1)
    assert results.largest_batch_within("quickstart") == 256
    assert results.rows[1].steps_to_target is not None
    assert (results.rows[2].steps_to_target, results.rows[2].reached) == (None, 2)
    assert "2 of 3 seeds" in printed(results)


def test_a_metric_that_is_to_fall_is_read_the_other_way_round(tmp_path: Path) -> None:
    plan, folder = (
        replace(
            plan_of(batch_sizes=(64, 256), seeds=2),
            metric=replace(ACCURACY, higher_is_better=False),
        ),
        Folder(tmp_path),
    )
    swept(plan, folder, lambda cell: [4.0, 2.0], lambda cell: 2.0 if cell.batch_size == 64 else 2.1)
    results = read_results(plan, folder, target=3.0, within_percent=1)
    assert results.largest_batch_within("quickstart") == 64
    assert [row.steps_to_target for row in results.rows] == [row.steps for row in results.rows]
    assert read_results(plan, folder, target=None, within_percent=1).target == 2.0


def test_a_grid_is_selected_on_validation_and_quoted_on_test(tmp_path: Path) -> None:
    plan, folder = (
        plan_of(["quickstart"], (64, 256), 2, rate_factors=(0.5, 1.0, 2.0)),
        Folder(tmp_path),
    )
    validation = {0.5: 0.6, 1.0: 0.7, 2.0: 0.65}
    test = {0.5: 0.9, 1.0: 0.5, 2.0: 0.8}
    swept(
        plan,
        folder,
        lambda cell: [validation[cell.rate_factor]],
        lambda cell: test[cell.rate_factor],
    )
    results = read_results(plan, folder, target=None, within_percent=1)
    assert [(row.rate_factor, row.mean, row.seeds) for row in results.rows] == [(1.0, 0.5, 2)] * 2
    # A point that one seed did not survive is no candidate.
    lost = cell_of(plan, "quickstart", 256, rate_factor=1.0, seed=1)
    (folder.run(lost) / "summary.json").unlink()
    folder.note_end(lost, 4)
    results = read_results(plan, folder, target=None, within_percent=1)
    assert [(row.rate_factor, row.mean) for row in results.rows] == [(1.0, 0.5), (2.0, 0.8)]


def test_what_makes_a_selection_doubtful_is_said(tmp_path: Path) -> None:
    plan, folder = (
        plan_of(["quickstart"], (64, 256), 1, rate_factors=(0.5, 1.0, 2.0)),
        Folder(tmp_path),
    )
    best = {64: 1.0, 256: 2.0}
    swept(
        plan,
        folder,
        lambda cell: [0.9 if cell.rate_factor == best[cell.batch_size] else 0.3],
        lambda cell: 0.5,
    )
    text = printed(read_results(plan, folder, target=None, within_percent=1))
    assert (
        "Selected at an end of --lr-grid, beyond which there may be a better one: quickstart at "
        "256 (×2)." in text
    )
    assert "--retry" not in text
    lost = cell_of(plan, "quickstart", 64, rate_factor=1.0)
    (folder.run(lost) / "summary.json").unlink()
    folder.note_end(lost, -9)
    text = printed(read_results(plan, folder, target=None, within_percent=1))
    assert "Failed runs (1) took no part in the selection" in text
    assert "killed by SIGKILL" in text
    # Diverging is a result, not a failure.
    folder.note_end(lost, 4)
    assert "took no part" not in printed(read_results(plan, folder, target=None, within_percent=1))


def test_presets_are_compared_seed_by_seed(tmp_path: Path) -> None:
    plan, folder = plan_of(seeds=3), Folder(tmp_path)
    gains = {64: (0.01, 0.02, 0.03), 256: (0.0, -0.02, -0.04)}

    def test_of(cell: Cell) -> float:
        gain = gains[cell.batch_size][cell.seed] if cell.preset == "quickstart-sgd" else 0.0
        return 0.5 + 0.1 * cell.seed + gain

    swept(plan, folder, lambda cell: [0.5], test_of)
    lost = cell_of(plan, "quickstart", 256, seed=0)
    (folder.run(lost) / "summary.json").unlink()
    folder.note_end(lost, 1)
    results = read_results(plan, folder, target=None, within_percent=1)
    small, large = results.differences()
    assert (small.preset, small.batch_size, small.seeds) == ("quickstart-sgd", 64, 3)
    assert small.mean == pytest.approx(0.02)
    assert small.standard_error == pytest.approx(0.01 / 3**0.5)
    assert (large.batch_size, large.seeds) == (256, 2)
    assert large.mean == pytest.approx(-0.03)
    text = printed(results)
    assert (
        "less quickstart, test accuracy in points, paired by seed, ± standard error: +2.00 ± "
        "0.58 at 64, -3.00" in text
    )
    assert "the standard deviation over the seeds" in text
    write_results(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["differences"][1]["seeds"] == 2


def test_test_results_are_not_shown_before_a_point_is_selected(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "sweep")
    for factors, shown in (
        ((0.5, 1.0), "validation accuracy 40.00 %"),
        ((1.0,), "test accuracy 70.00 %"),
    ):
        plan = plan_of(["quickstart"], (64,), rate_factors=factors)
        cell = plan.cells[0]
        swept(plan, folder, lambda cell: [0.4], lambda cell: 0.7)
        line = {"step": cell.steps, "split": "test", "accuracy": 0.7, "wall": {"seconds": 1.0}}
        with (folder.run(cell) / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        written = io.StringIO()
        with Display(plan, folder, [cell], written) as display:
            display.started(cell)
            display.ended(cell, Status.done)
        assert shown in written.getvalue()
        shutil.rmtree(folder.path)


def test_what_a_cell_did_before_it_was_interrupted_is_no_work_of_this_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder = plan_of(["quickstart"]), Folder(tmp_path / "sweep")
    first, second = plan.cells
    assert first.gradient_evaluations == second.gradient_evaluations
    run = folder.run(first)
    run.mkdir(parents=True)
    half = {"step": first.steps // 2, "split": "train", "accuracy": 0.5, "wall": {"seconds": 1.0}}
    (run / "metrics.jsonl").write_text(json.dumps(half) + "\n")
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    written = io.StringIO()
    with Display(plan, folder, plan.cells, written) as display:
        display.started(first)
        now[0] += 10
        display.ended(first, Status.done)
    # Half a cell in ten seconds; a whole one is left.
    assert written.getvalue().endswith("  10 s  0:00:20 left\n")


def at_80_columns(show: Callable[[Console], None]) -> list[str]:
    """Return the lines that a terminal of 80 columns gets, as wide as they are printed."""
    written = io.StringIO()
    show(Console(file=written, width=80, force_terminal=True, color_system=None, highlight=False))
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    return lines


@pytest.mark.parametrize(
    "names", [["short"], ["first", "second"], ["a-preset-whose-name-has-37-characters", *"bcd"]]
)
def test_no_result_is_lost_at_80_columns(names: list[str], tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.yaml" for name in names]
    for file in files:
        file.write_text("inherits: [quickstart]\n")
    plan = plan_of(list(map(str, files)), (64, 256), 3, rate_factors=(0.25, 0.5, 1.0))
    folder = Folder(tmp_path / "sweep")
    swept(plan, folder, lambda cell: [0.4, 0.6], lambda cell: 0.7 - cell.batch_size / 6400)
    results = read_results(plan, folder, target=0.59, within_percent=1)
    lines = at_80_columns(lambda console: print_results(results, console))
    for row in (
        r" 64 .* 69.00 ± 0.00 %  +3  +8,960  +140$",
        r" 256 .* 66.00 ± 0.00 %  +-3.00  +3  +7,680  +30$",
    ):
        assert sum(bool(re.search(row, line)) for line in lines) == len(names)
    speeds = dict.fromkeys(plan.presets, Speed(10.0, 0.001, 1.0))
    plan_lines = at_80_columns(lambda console: print_plan(plan, folder, console, 2, speeds))
    for row in (r" 64 .* 140  +8,960  +9  0:04:30$", r" 256 .* 30  +7,680  +9  0:04:18$"):
        assert sum(bool(re.search(row, line)) for line in plan_lines) == len(names)
    for name in names:
        assert any(line.startswith(name) for line in lines)
        assert any(line.startswith(name) for line in plan_lines)


def test_the_estimate_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    controller, terminal = pty.openpty()

    def measured(cell: Cell, gpus: Sequence[str], scratch: Path) -> Speed:
        (scratch / cell.name).mkdir()
        lines = "".join(f'{{"step": {step}, "split": "train"}}\n' for step in (1, 2))
        (scratch / cell.name / "metrics.jsonl").write_text(lines)
        time.sleep(0.6)
        return Speed(1.0, 1.0, 1.0)

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(execution, "wait_for_server", lambda: None)
    monkeypatch.setattr(execution, "measured_speed", measured)
    with os.fdopen(terminal, "w") as stream:
        assert set(execution.measured_speeds(plan, [], stream) or ()) == set(plan.presets)
        output = os.read(controller, 65536).decode()
    os.close(controller)
    assert "estimating the time" in output
    # Two of four steps of the first of two presets, and of the second.
    assert re.search(r"25 % quickstart .*75 % quickstart-sgd ", output, flags=re.DOTALL)


def test_steps_to_a_target_are_those_of_the_first_evaluation_that_reaches_it(
    tmp_path: Path,
) -> None:
    plan, folder = plan_of(batch_sizes=(64, 256), seeds=2), Folder(tmp_path)
    swept(plan, folder, lambda cell: [0.3, 0.55, 0.4, 0.7 if cell.seed else 0.6], lambda cell: 0.7)
    results = read_results(plan, folder, target=0.5, within_percent=1)
    assert [row.steps_to_target for row in results.rows] == [80, 20, 80, 20]
    assert [row.samples_to_target for row in results.rows] == [5120] * 4
    late = read_results(plan, folder, target=0.65, within_percent=1)
    assert [(row.steps_to_target, row.reached) for row in late.rows] == [(None, 1)] * 4
    assert "1 of 2 seeds" in printed(late)
    assert read_results(plan, folder, target=None, within_percent=1).target == 0.6


def test_two_gradients_a_sample_are_said_and_counted(tmp_path: Path) -> None:
    sam = tmp_path / "sam.yaml"
    sam.write_text("inherits: [quickstart, variant/sam]\n")
    plan, folder = plan_of([str(sam), "quickstart-sgd"], (64, 256)), Folder(tmp_path / "sweep")
    swept(plan, folder, lambda cell: [0.5], lambda cell: 0.5)
    results = read_results(plan, folder, target=0.5, within_percent=1)
    assert "Gradients a sample: sam 2, all others 1." in printed(results)
    costs = [row.gradient_evaluations_to_target for row in results.rows]
    assert costs == [20480, 20480, 10240, 10240]
    # They count to the target, and end before it with --set extrapolation.until.
    half = replace(cell_of(plan, "sam", 64), second_gradients=range(0, 80, 2))
    assert [half.gradients_until(step) for step in (0, 1, 40, 80, 160)] == [
        0,
        128,
        60 * 64,
        120 * 64,
        200 * 64,
    ]


@pytest.mark.parametrize(
    ("presets", "batch_sizes"), [(1, (64,)), (9, (32, 64, 96, 128, 192, 256, 512))]
)
def test_the_picture_is_drawn_for_few_and_many_also_with_holes(
    presets: int, batch_sizes: tuple[int, ...], tmp_path: Path
) -> None:
    names = [
        str(tmp_path / f"a-preset-with-quite-a-long-name-{number}.yaml")
        for number in range(presets)
    ]
    for name in names:
        Path(name).write_text("inherits: [quickstart]\n")
    plan, folder = plan_of(names, batch_sizes), Folder(tmp_path / "sweep")
    swept(plan, folder, lambda cell: [0.3, 0.5], lambda cell: 0.5)
    if len(batch_sizes) > 1:
        (folder.run(plan.cells[-1]) / "summary.json").unlink()
        folder.note_end(plan.cells[-1], -9)
    results = read_results(plan, folder, target=0.4, within_percent=1)
    save_figure(picture_of(results), tmp_path / "sweep" / "sweep")
    write_results(results, tmp_path / "sweep")
    assert (tmp_path / "sweep" / "sweep.svg").read_bytes().startswith(b"<?xml")
    assert (tmp_path / "sweep" / "sweep.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "sweep" / "results.json").read_text())["rows"]
    assert len((tmp_path / "sweep" / "results.csv").read_text().splitlines()) == 1 + len(plan.cells)


def test_the_picture_says_what_is_drawn(tmp_path: Path) -> None:
    plan, folder = (
        plan_of(batch_sizes=(64, 256), seeds=2, settings=["model.width=4"]),
        Folder(tmp_path),
    )
    swept(plan, folder, lambda cell: [0.4, 0.6], lambda cell: 0.7)
    lost = plan.cells[0]
    (folder.run(lost) / "summary.json").unlink()
    folder.note_end(lost, 4)
    figure = picture_of(read_results(plan, folder, target=None, within_percent=1))
    assert figure.get_suptitle().splitlines() == [
        "resnet-8 (width 4) on synthetic, 10 epochs, mean ± standard deviation of 2 seeds",
        "Without 1 run that failed or diverged",
        "Noise scale (median and quartiles of the runs): beyond it, larger batches save few steps",
    ]
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "Final test accuracy",
        "Steps to 60 % test accuracy",
        "Samples to 60 % test accuracy",
        "Learning curves",
    ]


@pytest.mark.parametrize(
    ("presets", "titles"),
    [
        (("quickstart",), ["Learning curves"]),
        (("quickstart", "quickstart-sgd"), ["Final test accuracy", "Learning curves"]),
    ],
)
def test_a_single_batch_size_has_no_panel_of_single_dots(
    presets: tuple[str, ...], titles: list[str], tmp_path: Path
) -> None:
    plan, folder = plan_of(presets, (64,)), Folder(tmp_path)
    swept(plan, folder, lambda cell: [0.4, 0.6], lambda cell: 0.7)
    figure = picture_of(read_results(plan, folder, target=None, within_percent=1))
    assert [axes.get_title() for axes in figure.axes] == titles
    title = figure.get_suptitle().replace("\n", " ")
    assert title == "resnet-8 (width 8) on synthetic, batch size 64, 10 epochs, one seed"


# ---- the search for a learning rate


def merits_of(values: dict[float, float | None], seeds: int = 1) -> dict[float, Merit]:
    return {
        factor: Merit(0, -math.inf) if value is None else Merit(seeds, value)
        for factor, value in values.items()
    }


@pytest.mark.parametrize(
    ("values", "further"),
    [
        ({0.5: 0.6, 1: 0.7, 2: 0.6}, ()),
        ({0.5: 0.7, 1: 0.6, 2: 0.5}, (0.25,)),
        ({0.5: 0.5, 1: 0.6, 2: 0.7}, (4,)),
        ({0.25: 0.6, 0.5: 0.7, 1: 0.6, 2: 0.5}, ()),
        # Best inside, whatever lies between.
        ({0.5: 0.6, 1: 0.7, 2: 0.3, 4: 0.65}, ()),
        # As good as the best is not worse.
        ({0.5: 0.6, 1: 0.7, 2: 0.7}, (4,)),
        ({0.5: 0.7, 1: 0.7, 2: 0.6}, (0.25,)),
        ({0.5: 0.7, 1: 0.7, 2: 0.7}, (0.25, 4)),
        ({0.5: 0.6, 1: 0.7, 2: 0.7, 4: 0.6}, ()),
        # Diverged is worse than any result, and where all diverged only lower rates can help.
        ({0.5: 0.6, 1: 0.7, 2: None}, ()),
        ({0.5: 0.1, 1: None, 2: None}, (0.25,)),
        ({0.5: None, 1: None, 2: 0.1}, (4,)),
        ({0.5: None, 1: None, 2: None}, (0.25,)),
        # Bounds.
        ({2.0**-6: 0.7, 1: 0.6, 2: 0.5}, ()),
        ({0.5: 0.5, 1: 0.6, 2.0**6: 0.7}, ()),
        ({2.0**-6: None, 1: None, 2: None}, ()),
        ({2.0**-6: 0.7, 1: 0.7, 2: 0.7}, (4,)),
    ],
)
def test_a_search_goes_on_at_an_end_that_is_as_good_as_the_best(
    values: dict[float, float | None], further: tuple[float, ...]
) -> None:
    assert next_factors(merits_of(values)) == further


def test_a_rate_that_a_seed_did_not_survive_is_worse_than_one_that_all_did() -> None:
    assert next_factors({0.5: Merit(3, 0.5), 1: Merit(3, 0.4), 2: Merit(2, 0.9)}) == (0.25,)


class Search:
    """A search of the learning rate with cells that do nothing but have results."""

    def __init__(self, folder: Folder, **further: Any) -> None:
        further = {"presets": ("quickstart", "quickstart-sgd"), "batch_sizes": (64,), **further}
        given = ("epochs=10", "optimizer.lr=1.6", "device=cpu")
        self.request = Request(
            **{"seeds": 1, **further},
            settings=given,
            rate_factors=FIRST_FACTORS,
            search_rates=True,
        )
        self.presets = checked_presets(self.request)
        self.first, self.folder = make_plan(self.request, self.presets, facts_of), folder

    def plan(self) -> Plan:
        return continued(self.first, self.request, self.presets, facts_of, self.folder)

    def run(self, *, retry: bool = False) -> str:
        """Run it as the command does, and return what it shows."""
        shown = io.StringIO()
        self.folder.claim(self.first)
        run_cells(
            self.plan(),
            self.folder,
            jobs=8,
            gpus=(),
            retry=retry,
            stream=shown,
            go_on=self.plan,
        )
        return shown.getvalue()

    def results(self) -> Results:
        return read_results(self.plan(), self.folder, target=None, within_percent=1)

    def factors(self, preset: str, batch_size: int = 64, **wanted: object) -> list[float]:
        """Return the factors that were tried, in order of size."""
        return [
            cell.rate_factor
            for cell in self.plan().cells
            if (cell.preset, cell.batch_size) == (preset, batch_size)
            and all(getattr(cell, key) == value for key, value in wanted.items())
        ]


def peak_at(best: float) -> Callable[[Cell], float]:
    """Return the validation accuracy of a cell, the worse the further its rate is from the best."""
    return lambda cell: 0.9 - 0.05 * abs(math.log2(cell.rate_factor / best))


BEST = {"quickstart": 4.0, "quickstart-sgd": 0.25}


def test_every_preset_is_searched_until_worse_rates_lie_on_both_sides(
    fake: FakeCells, tmp_path: Path
) -> None:
    fake.value = lambda cell: peak_at(BEST[cell.preset])(cell)
    search = Search(Folder(tmp_path / "sweep"))
    shown = search.run()
    assert search.factors("quickstart") == [0.5, 1, 2, 4, 8]
    assert search.factors("quickstart-sgd") == [0.125, 0.25, 0.5, 1, 2]
    # A round runs as a whole before the next is decided.
    assert [re.search(r"-(lr[\d.]+)-s0", name)[1] for name in fake.started[6:]] == [  # type: ignore[index]
        "lr4",
        "lr0.25",
        "lr8",
        "lr0.125",
    ]
    assert "The search goes on: quickstart at 64 ×4, quickstart-sgd at 64 ×0.25\n" in shown
    assert "10/10" in shown.splitlines()[-1]
    assert [row.rate_factor for row in search.results().rows] == [4.0, 0.25]
    commands = json.loads((search.folder.path / "sweep.json").read_text())["commands"]
    assert set(commands) == names_of(search.plan())
    for cell in search.plan().cells:
        assert cell.learning_rate == pytest.approx(0.2 * cell.rate_factor)


def test_a_finished_search_is_read_again_without_running_anything(
    fake: FakeCells, tmp_path: Path
) -> None:
    fake.value = lambda cell: peak_at(BEST[cell.preset])(cell)
    search = Search(Folder(tmp_path / "sweep"))
    search.run()
    once = search.plan()
    fake.started.clear()
    assert search.run() == ""
    assert (fake.started, search.plan()) == ([], once)


def test_an_interrupted_search_tries_what_an_undisturbed_one_does(
    fake: FakeCells, tmp_path: Path
) -> None:
    fake.value = lambda cell: peak_at(BEST[cell.preset])(cell)
    undisturbed = Search(Folder(tmp_path / "undisturbed"))
    undisturbed.run()
    search = Search(Folder(tmp_path / "sweep"))
    fake.codes = dict.fromkeys(["quickstart-sgd-b64-lr1-s0", "quickstart-b64-lr4-s0"], 75)
    for _ in range(2):  # one search is ahead of the other when it goes on
        with pytest.raises(InterruptedRun):
            search.run()
        fake.codes.popitem()
    assert search.factors("quickstart") == [0.5, 1, 2, 4, 8]
    assert search.factors("quickstart-sgd") == [0.5, 1, 2]
    search.run()
    assert search.plan().cells == undisturbed.plan().cells
    assert search.plan().identity == undisturbed.plan().identity


def test_a_search_judges_by_the_mean_over_the_seeds(fake: FakeCells, tmp_path: Path) -> None:
    # Of the first seed ×1 is best, on average ×4.
    peaks = (1.0, 4.0, 8.0)
    fake.value = lambda cell: peak_at(peaks[cell.seed])(cell)
    search = Search(Folder(tmp_path / "sweep"), presets=("quickstart",), seeds=3)
    search.run()
    assert sorted(set(search.factors("quickstart"))) == [0.5, 1, 2, 4, 8]
    assert len(search.plan().cells) == 15
    assert search.results().rows[0].rate_factor == 4
    # With one seed in the same folder only its own runs count.
    alone = Search(search.folder, presets=("quickstart",), seeds=1)
    assert alone.factors("quickstart") == [0.5, 1, 2]


def test_each_length_of_the_extrapolation_has_its_own_search(
    fake: FakeCells, tmp_path: Path
) -> None:
    fake.value = lambda cell: peak_at(4.0 if cell.length_factor == 2 else 1.0)(cell)
    search = Search(Folder(tmp_path / "sweep"), length_factors=(1.0, 2.0))
    search.run()
    assert search.factors("quickstart", length_factor=1.0) == [0.5, 1, 2]
    assert search.factors("quickstart", length_factor=2.0) == [0.5, 1, 2, 4, 8]
    assert search.factors("quickstart-sgd") == [0.5, 1, 2]
    assert [row.grid_points for row in search.results().rows] == [8, 3]


def test_how_much_was_tried_is_said_wherever_results_are(fake: FakeCells, tmp_path: Path) -> None:
    fake.value = lambda cell: peak_at(2.0 if cell.batch_size == 256 else 1.0)(cell)
    search = Search(Folder(tmp_path / "sweep"), presets=("quickstart",), batch_sizes=(64, 256))
    search.run()
    results = search.results()
    text = printed(results)
    for line in (
        r"^preset +batch +K +rate +shift +points tried ",
        r"^quickstart +64 .* 3 +70.00 %",
        r"^quickstart +256 .* \(×2\) .* 4 +70.00 %",
        r"^The learning rate is searched from the scaled one outwards in factors of two, .* with "
        r"all seeds at every rate, until worse rates lie on both sides of the best one",
        r"^Points of the grid that were tried: quickstart 3 at 64, 4 at 256\.$",
    ):
        assert re.search(line, text, re.MULTILINE)
    assert "Selected at an end" not in text
    assert "bound" not in text
    write_results(results, tmp_path)
    record = json.loads((tmp_path / "results.json").read_text())
    assert [(row["grid_points"], row["rate_enclosed"]) for row in record["rows"]] == [
        (3, True),
        (4, True),
    ]
    lines = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [line["grid_points"] for line in lines] == ["3"] * 3 + ["4"] * 4
    assert "at the best of 3 to 4 grid points, selected" in picture_of(results).get_suptitle()


def test_a_search_that_ends_at_its_bound_says_so(fake: FakeCells, tmp_path: Path) -> None:
    fake.value = lambda cell: 0.5 + 0.01 * math.log2(cell.rate_factor)
    search = Search(Folder(tmp_path / "sweep"), presets=("quickstart",))
    search.run()
    assert search.factors("quickstart")[-1] == 64
    text = printed(search.results())
    assert "The search ended at its bound" in text
    assert "quickstart at 64 (×64). Start from another optimizer.lr." in text
    assert search.results().rows[0].rate_enclosed is False


def test_of_equally_good_rates_the_one_nearest_to_the_scaled_rate_is_selected(
    fake: FakeCells, tmp_path: Path
) -> None:
    fake.value = lambda cell: 0.5 if 0.25 <= cell.rate_factor <= 4 else 0.4
    search = Search(Folder(tmp_path / "sweep"), presets=("quickstart",))
    search.run()
    assert search.factors("quickstart") == [0.125, 0.25, 0.5, 1, 2, 4, 8]
    assert search.results().rows[0].rate_factor == 1


def test_rates_that_diverge_are_a_result_and_no_failure(fake: FakeCells, tmp_path: Path) -> None:
    fake.value = peak_at(1.0)
    fake.codes = {f"quickstart-b64-lr{factor:g}-s0": 4 for factor in (0.5, 1, 2, 4)}
    fake.codes["quickstart-sgd-b64-lr2-s0"] = 4
    search = Search(Folder(tmp_path / "sweep"))
    search.run()
    # The best that is left, with a worse rate below it.
    assert search.factors("quickstart") == [0.125, 0.25, 0.5, 1, 2]
    assert search.factors("quickstart-sgd") == [0.5, 1, 2]
    assert [row.rate_factor for row in search.results().rows] == [0.25, 1]
    execution.require_success(search.plan(), search.folder, search.results().selected)
    assert "--retry" not in search.run()


def test_a_preset_that_diverges_at_all_rates_is_a_failure(fake: FakeCells, tmp_path: Path) -> None:
    fake.value = peak_at(1.0)
    fake.codes = {f"quickstart-b64-lr{2.0**octave:.12g}-s0": 4 for octave in range(-6, 2)}
    search = Search(Folder(tmp_path / "sweep"))
    search.run()
    assert search.factors("quickstart") == [2.0**octave for octave in range(-6, 2)]
    results = search.results()
    assert (results.rows[0].mean, results.rows[0].rate_factor) == (None, 1)
    text = printed(results)
    assert "down to 1/64 of the scaled one was low enough: every run diverged of quick" in text
    assert "Start from another" not in text
    with pytest.raises(EgtrainError, match=r"1 of 11 cells failed \(quickstart-b64-lr1-s0\)"):
        execution.require_success(search.plan(), search.folder, results.selected)
    picture_of(results)


def test_a_search_waits_for_a_failed_run(fake: FakeCells, tmp_path: Path) -> None:
    fake.value = lambda cell: peak_at(BEST[cell.preset])(cell)
    fake.codes = {"quickstart-b64-lr1-s0": 1}
    search = Search(Folder(tmp_path / "sweep"))
    search.run()
    assert search.factors("quickstart") == [0.5, 1, 2]
    assert search.factors("quickstart-sgd") == [0.125, 0.25, 0.5, 1, 2]
    text = printed(search.results())
    assert "Failed runs (1) took no part in the selection, and their search waits: --retry" in text
    assert "bound" not in text
    assert "quickstart-b64-lr1-s0: failed before; --retry runs it again" in search.run()
    fake.codes = {}
    search.run(retry=True)
    assert search.factors("quickstart") == [0.5, 1, 2, 4, 8]


def test_a_searched_folder_may_have_been_a_grid_before(fake: FakeCells, tmp_path: Path) -> None:
    fake.value = lambda cell: peak_at(4.0)(cell)
    folder = Folder(tmp_path / "sweep")
    run(plan_of(["quickstart"], (64,), rate_factors=(1.0, 4.0)), folder)
    fake.started.clear()
    Search(folder, presets=("quickstart",)).run()
    assert len(fake.started) == 3  # ×0.5 and ×2, then ×8


# ---- the real thing


def sweep_arguments(data: Path, output: str, *further: str) -> list[str]:
    pairs = [
        s for s in settings(data, "epochs=8", "evaluate_every=8") if not s.startswith("threads=")
    ]
    options = [part for pair in pairs for part in ("--set", pair)]
    return [
        "sweep-batch",
        "--preset",
        "quickstart",
        "--batch-sizes",
        "32,64",
        *options,
        "--output",
        output,
        *further,
    ]


def test_a_killed_sweep_goes_on_and_its_cells_are_undisturbed_runs(
    egtrain_command: Callable[..., Result], images: Path, tmp_path: Path
) -> None:
    cells = tmp_path / "sweep" / "cells"
    first, second = cells / "quickstart-b32-s0", cells / "quickstart-b64-s0"
    command = sweep_arguments(images, "sweep", "--jobs", "1", "--no-estimate")
    with Forked(command, tmp_path, {"COLUMNS": "200"}) as sweep:
        wait_until(lambda: steps_logged(second) >= 2)
        sweep.send(signal.SIGKILL)
    finished = (first / "summary.json").stat().st_mtime_ns
    # The cell that was left alone notices, saves and ends; the next start waits for it.
    result = egtrain_command(*command)
    assert (result.code, result.stderr) == (0, "")
    assert "2 runs, 1 at a time" in result.stdout
    assert (
        "results.csv, results.json, sweep.png, sweep.svg and sweep.pdf are in sweep"
        in result.stdout
    )
    assert (first / "summary.json").stat().st_mtime_ns == finished
    for cell in (first, second):
        alone = run_here(tmp_path / "alone" / cell.name, load_config(cell / "config.yaml"))
        assert outcome(cell) == outcome(alone)

    # Finished: the runs are only read again, here for another target.
    result = egtrain_command(*command, "--target", "0.2", "--json")
    assert json.loads(result.stdout)["target"]["value"] == 0.2
    # In the processes' own output there is nothing but that of `train`.
    assert "Warning" not in "".join(
        log.read_text() for log in (tmp_path / "sweep" / "logs").iterdir()
    )
    other_sizes = ["64,128" if word == "32,64" else word for word in command]
    assert "1 of them are finished" in egtrain_command(*other_sizes, "--dry-run").stdout
    changed = egtrain_command(*command, "--set", "optimizer.lr=0.3")
    assert changed.code == 2
    assert "sweep holds another sweep (presets quickstart optimizer.lr: " in changed.line


def test_a_search_that_is_stopped_by_ctrl_c_goes_on_and_runs_nothing_twice(
    egtrain_command: Callable[..., Result], images: Path, tmp_path: Path
) -> None:
    cells = tmp_path / "sweep" / "cells"
    further = ("--jobs", "2", "--no-estimate", "--lr-grid", "auto", "--validation", "64")
    command = sweep_arguments(images, "sweep", *further)
    command[command.index("32,64")] = "32"
    with Forked(command, tmp_path, {"COLUMNS": "200"}) as sweep:
        wait_until(lambda: steps_logged(cells / "quickstart-b32-lr2-s0") >= 2)
        sweep.send(signal.SIGINT)
        assert sweep.wait() == 75
    result = egtrain_command(*command)
    assert (result.code, result.stderr) == (0, "")
    assert "The search goes on: quickstart at 32 ×" in result.stdout
    finished = {run.name: (run / "summary.json").stat().st_mtime_ns for run in cells.iterdir()}
    assert len(finished) > 3
    record = (tmp_path / "sweep" / "results.json").read_text()
    (row,) = json.loads(record)["rows"]
    assert row["grid_points"] == len(finished)
    assert "3 runs, 2 at a time, 1,536 gradient evaluations; the search may add" in sweep.stdout
    again = egtrain_command(*command)
    assert again.code == 0
    assert f"{len(finished)} runs, 2 at a time, 2,560 gradient evaluations\n" in again.stdout
    assert (tmp_path / "sweep" / "results.json").read_text() == record
    assert finished == {
        run.name: (run / "summary.json").stat().st_mtime_ns for run in cells.iterdir()
    }


def test_the_plan_estimates_the_time_from_a_few_steps_and_leaves_nothing(
    egtrain_command: Callable[..., Result], images: Path, tmp_path: Path
) -> None:
    result = egtrain_command(*sweep_arguments(images, "sweep", "--dry-run", "--jobs", "2"))
    assert (result.code, result.stderr) == (0, "")
    assert re.search(
        r"^2 runs, 2 at a time, 2,048 gradient evaluations, about 0:0\d:\d\d$",
        result.stdout,
        re.MULTILINE,
    )
    assert not list(tmp_path.iterdir())
