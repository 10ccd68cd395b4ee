"""A run that was interrupted or killed and goes on ends bit for bit as if nothing had happened."""

import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    EXTRAPOLATIONS,
    STEPS,
    Fault,
    Forked,
    arguments,
    command_line,
    config_of,
    kill,
    metrics_in,
    newest_checkpoint,
    outcome,
    run_here,
    steps_logged,
    terminate,
    wait_until,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from egtrain.__main__ import main
from egtrain.build import build_run
from egtrain.config.schema import Config
from egtrain.errors import InterruptedRun, UsageError
from egtrain.train import take_step
from egtrain.workers import Ranks

pytestmark = pytest.mark.timeout(120)
Undisturbed = Callable[..., dict[str, Any]]


def interrupted(directory: Path, config: Config, *steps: int) -> Path:
    """Run until each of the steps in turn, with an interruption at each."""
    done = 0
    for step in steps:
        with pytest.raises(
            InterruptedRun,
            match=f"interrupted after step {step}; a checkpoint was saved; go on with",
        ):
            run_here(directory, config, resume=done > 0, stop_after=step - done)
        assert outcome(directory)["step"] == steps_logged(directory) == step
        done = step
    return directory


@pytest.mark.parametrize(
    "steps",
    [(1,), (6,), (4,), (5,), (5, 6, 7), (11,)],
    ids=[
        "first step",
        "mid-epoch",
        "end of an epoch",
        "first of an epoch",
        "three times in an epoch",
        "last but one",
    ],
)
def test_a_run_that_was_interrupted_ends_as_if_it_was_not(
    steps: tuple[int, ...], images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    config = config_of(images)
    run_here(interrupted(tmp_path / "run", config, *steps), config, resume=True)
    assert outcome(tmp_path / "run") == undisturbed()


@pytest.mark.parametrize("extrapolation", [name for name in EXTRAPOLATIONS if name != "local"])
def test_every_extrapolation_goes_on_where_it_was(
    extrapolation: str, images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    config = config_of(images, extrapolation=extrapolation)
    run_here(interrupted(tmp_path / "run", config, 6), config, resume=True)
    assert outcome(tmp_path / "run") == undisturbed(extrapolation=extrapolation)


def test_every_extrapolation_trains_another_net(undisturbed: Undisturbed) -> None:
    """Otherwise the tests above would hold for an extrapolation that does nothing."""
    outcomes = [undisturbed(extrapolation=name)["metrics"][-1]["loss"] for name in EXTRAPOLATIONS]
    assert len(set(outcomes)) == len(EXTRAPOLATIONS)


@pytest.mark.parametrize("until", [2, 6, 10], ids=["before", "at the interruption", "after"])
def test_the_end_of_extrapolation_is_where_it_was(
    until: int, images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    further = f"extrapolation.until={until / STEPS}"
    config = config_of(images, further)
    run_here(interrupted(tmp_path / "run", config, 6), config, resume=True)
    assert outcome(tmp_path / "run") == undisturbed(further)
    sizes = [
        line["extrapolation_size"]
        for line in metrics_in(tmp_path / "run")
        if line["split"] == "train"
    ]
    assert [size > 0 for size in sizes] == [1 <= step < until for step in range(STEPS)]


def test_clipping_and_validation_go_on_where_they_were(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    further = ("optimizer.clip_norm=0.05", "data.validation=20")
    config = config_of(images, *further)
    run_here(interrupted(tmp_path / "run", config, 6), config, resume=True)
    assert outcome(tmp_path / "run") == undisturbed(*further)


def test_a_finished_run_is_left_alone_and_shown_again(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def files() -> dict[str, bytes]:
        kept = [
            path
            for path in sorted((tmp_path / "run").rglob("*"))
            if path.is_file() and path.name != ".lock"
        ]
        return {str(path): path.read_bytes() for path in kept}

    run_here(tmp_path / "run", config_of(images, "log.tensorboard=true"))
    lines = capsys.readouterr().out.splitlines()
    result = next(number for number, line in enumerate(lines) if line.startswith("test: "))
    shown = lines[result : result + 2]
    before = files()
    monkeypatch.setattr(sys, "argv", ["egtrain", "train", "--resume", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    again = capsys.readouterr()
    assert again.out.splitlines() == shown
    assert again.err == f"{tmp_path / 'run'} is complete: there is nothing left to train\n"
    assert files() == before


def test_a_longer_run_says_how_its_plan_changes_where_it_goes_on(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(tmp_path / "run", config_of(images))
    capsys.readouterr()
    run_here(tmp_path / "run", config_of(images, "epochs=6"), resume=True)
    told = [line for line in capsys.readouterr().err.splitlines() if "plan" in line]
    rates = [
        line["learning_rate"] for line in metrics_in(tmp_path / "run") if "gradient_norm" in line
    ]
    assert told == [
        f"the plan has changed: 24 steps instead of 12; learning rate {rates[11]:.4g} at step 12, "
        f"{rates[12]:.4g} at step 13"
    ]
    assert rates[12] > 10 * rates[11]
    assert outcome(tmp_path / "run")["step"] == len(rates) == 24


def test_another_rate_from_the_step_on_where_a_run_goes_on_is_said(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(tmp_path / "run", config_of(images, "schedule.decay=constant"), 6)
    capsys.readouterr()
    changed = config_of(images, "schedule.decay=constant", "optimizer.lr=0.025")
    run_here(tmp_path / "run", changed, resume=True)
    told = [line for line in capsys.readouterr().err.splitlines() if "plan" in line]
    assert told == ["the plan has changed: learning rate 0.1 at step 6, 0.025 at step 7"]


def test_a_run_that_goes_on_as_planned_says_nothing_of_it(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(images)
    interrupted(tmp_path / "run", config, 6)
    run_here(tmp_path / "run", config, resume=True)
    assert "plan" not in capsys.readouterr().err


def test_a_run_is_not_shortened_below_the_step_it_has_reached(
    images: Path, undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(tmp_path / "run", config_of(images), 6)
    shorter = ["train", "--resume", str(tmp_path / "run"), "--allow-changes", "--steps"]
    capsys.readouterr()
    result = command_line(capsys, *shorter, "5")
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == (
        f"egtrain: {tmp_path / 'run'} has made 6 steps, and the settings end it at step 5: leave "
        "out --epochs and --steps, or give --steps 6 or more"
    )
    run_here(tmp_path / "run", config_of(images), resume=True)
    assert outcome(tmp_path / "run") == undisturbed()


def test_a_run_may_end_at_the_step_it_has_reached(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(tmp_path / "run", config_of(images), 6)
    capsys.readouterr()
    run_here(tmp_path / "run", config_of(images, "steps=6"), resume=True)
    assert "the plan has changed: 6 steps instead of 12\n" in capsys.readouterr().err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 6
    assert 0 < summary["final"]["test"]["accuracy"] < 1


def test_a_run_that_lost_its_summary_makes_it_again(images: Path, tmp_path: Path) -> None:
    config = config_of(images)
    run_here(tmp_path / "run", config)
    before = outcome(tmp_path / "run"), json.loads((tmp_path / "run/summary.json").read_text())
    (tmp_path / "run/summary.json").unlink()
    run_here(tmp_path / "run", config, resume=True)
    assert outcome(tmp_path / "run") == before[0]
    assert json.loads((tmp_path / "run/summary.json").read_text()) | {"wall": 0} == before[1] | {
        "wall": 0
    }


def test_tensorboard_holds_every_step_once_after_a_resume(images: Path, tmp_path: Path) -> None:
    config = config_of(images, "log.tensorboard=true", "checkpoint.every=2")
    with Forked(
        [*arguments(images, "checkpoint.every=2", "log.tensorboard=true"), "--output", "run"],
        tmp_path,
        before=Fault(kill, step=5),
    ) as process:
        assert process.wait() == -signal.SIGKILL
    assert steps_logged(tmp_path / "run") == 5
    run_here(tmp_path / "run", config, resume=True)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert [event.step for event in events.Scalars("test/accuracy")] == [4, 8, 12]
    assert [
        line["step"] for line in metrics_in(tmp_path / "run") if line["split"] == "train"
    ] == list(range(1, 13))


SEEDS = range(4)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_that_was_killed_ends_as_if_it_was_not(
    seed: int, images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """The process dies at shifted weights, while some worker takes its gradient."""
    further = ("checkpoint.every=3",)
    chance = random.Random(seed)
    fault = Fault(kill, step=chance.choice([2, 4, 5, 7, 8, 10, 11]), worker=chance.randrange(4))
    with Forked(
        [*arguments(images, *further), "--output", "run"], tmp_path, before=fault
    ) as process:
        assert process.wait() == -signal.SIGKILL
    assert steps_logged(tmp_path / "run") == fault.step
    if fault.step > 3:
        assert outcome(tmp_path / "run")["step"] == fault.step // 3 * 3
    run_here(tmp_path / "run", config_of(images, *further), resume=True)
    assert outcome(tmp_path / "run") == undisturbed(*further)


def test_a_run_that_was_killed_again_and_again_ends_as_if_it_was_not(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Before the first checkpoint, in an evaluation, and right after that."""
    faults = [Fault(kill, step=2), Fault(kill, step=8, in_evaluation=True), Fault(kill, step=8)]
    for command, fault in zip(
        [[*arguments(images), "--output", "run"], *[["train", "--resume", "run"]] * 2],
        faults,
        strict=True,
    ):
        with Forked(command, tmp_path, before=fault) as process:
            assert process.wait() == -signal.SIGKILL, process.stderr
    run_here(tmp_path / "run", config_of(images), resume=True)
    assert outcome(tmp_path / "run") == undisturbed()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_step_end_saves_and_returns_75(
    number: int, images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    fault = Fault(partial(time.sleep, 2.5), step=5)
    with Forked([*arguments(images), "--output", "run"], tmp_path, before=fault) as process:
        wait_until(lambda: steps_logged(tmp_path / "run") == 5)
        time.sleep(0.2)
        process.send(number)
        # A terminal and a launcher both deliver Ctrl-C: the second within two seconds does not
        # count.
        time.sleep(0.2)
        process.send(number)
        assert process.wait() == 75
    assert (
        process.stderr
        == "egtrain: interrupted after step 6; a checkpoint was saved; go on with --resume run\n"
    )
    assert outcome(tmp_path / "run")["step"] == steps_logged(tmp_path / "run") == 6
    run_here(tmp_path / "run", config_of(images), resume=True)
    assert outcome(tmp_path / "run") == undisturbed()


@dataclass(frozen=True)
class Ignoring:
    """As `nohup` (SIGHUP) or a script's background (Ctrl-C) does; and the run waits in a step."""

    number: int

    def __call__(self) -> None:
        signal.signal(self.number, signal.SIG_IGN)
        Fault(partial(time.sleep, 1), step=5)()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_the_process_was_started_to_ignore_is_ignored(
    number: int, images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    with Forked(
        [*arguments(images), "--output", "run"], tmp_path, before=Ignoring(number)
    ) as process:
        wait_until(lambda: steps_logged(tmp_path / "run") == 5)
        process.send(number)
        assert process.wait() == 0, process.stderr
    assert outcome(tmp_path / "run") == undisturbed()


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once_and_harms_nothing(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    further = ("checkpoint.every=2",)
    fault = Fault(partial(time.sleep, 30), step=5)
    with Forked(
        [*arguments(images, *further), "--output", "run"], tmp_path, before=fault
    ) as process:
        wait_until(lambda: steps_logged(tmp_path / "run") == 5)
        process.send(signal.SIGINT)
        time.sleep(3)
        process.send(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
    assert outcome(tmp_path / "run")["step"] == 4
    run_here(tmp_path / "run", config_of(images, *further), resume=True)
    assert outcome(tmp_path / "run") == undisturbed(*further)


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        (Fault(terminate, in_evaluation=True, step=4), 5),
        (Fault(terminate, in_evaluation=True, step=STEPS), None),
    ],
    ids=["during an evaluation", "during the last evaluation"],
)
def test_a_signal_during_an_evaluation_waits_for_its_end(
    fault: Fault, step: int | None, images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    with Forked([*arguments(images), "--output", "run"], tmp_path, before=fault) as process:
        assert process.wait() == (0 if step is None else 75)
    assert outcome(tmp_path / "run")["step"] == (step or STEPS)
    run_here(tmp_path / "run", config_of(images), resume=True)
    assert outcome(tmp_path / "run") == undisturbed()


def test_a_signal_before_the_training_ends_it_at_once(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Nobody wants to wait for a download after Ctrl-C."""
    with Forked(
        [*arguments(images), "--output", "run"], tmp_path, before=Fault(terminate, in_data=True)
    ) as process:
        assert process.wait() == 75
    assert process.stderr == "egtrain: interrupted before the training; go on with --resume run\n"
    assert not (tmp_path / "run/metrics.jsonl").exists()
    run_here(tmp_path / "run", config_of(images), resume=True)
    assert outcome(tmp_path / "run") == undisturbed()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    images: Path, undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(images)
    interrupted(tmp_path / "run", config, 6)
    newest = newest_checkpoint(tmp_path / "run")
    newest.write_bytes(newest.read_bytes()[:-100])
    run_here(tmp_path / "run", config, resume=True)
    (warning,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")
    ]
    assert str(newest) in warning
    assert "going back to the checkpoint before it" in warning
    assert outcome(tmp_path / "run") == undisturbed()


def test_a_run_goes_on_in_another_place(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    config = config_of(images)
    interrupted(tmp_path / "here", config, 6)
    shutil.move(tmp_path / "here", tmp_path / "there")
    run_here(tmp_path / "there", config, resume=True)
    assert outcome(tmp_path / "there") == undisturbed()


def test_settings_that_are_changed_on_purpose_are_those_of_the_run(images: Path) -> None:
    before = build_run(config_of(images, "optimizer.clip_norm=0.01"), Ranks())
    take_step(before, 0.1)
    run = build_run(
        config_of(images, "optimizer.weight_decay=0.1", "optimizer.momentum=0.5"), Ranks()
    )
    run.load_state_dict(before.state_dict())
    (group,) = run.optimizer.param_groups
    assert (group["weight_decay"], group["momentum"]) == (0.1, 0.5)
    assert torch.equal(run.workers.parameters, before.workers.parameters)


def test_gradients_are_counted_by_the_settings_that_they_were_taken_with(images: Path) -> None:
    run = build_run(
        config_of(images, "extrapolation.name=sam", "extrapolation.radius=0.05"), Ranks()
    )
    for _ in range(2):
        take_step(run, 0.1)
    batch = run.task.batch_size
    assert run.gradient_evaluations == 4 * batch
    state = run.state_dict()
    seldom = ("extrapolation.name=sam", "extrapolation.radius=0.05", "extrapolation.every=4")
    run = build_run(config_of(images, *seldom), Ranks())
    run.load_state_dict(state)
    for _ in range(3):
        take_step(run, 0.1)
    assert run.gradient_evaluations == 8 * batch


def test_extrapolation_does_not_begin_in_the_middle_of_a_run(images: Path) -> None:
    run = build_run(config_of(images, "extrapolation.name=none"), Ranks())
    with pytest.raises(ValueError, match="it was trained without extrapolation"):
        build_run(config_of(images), Ranks()).load_state_dict(run.state_dict())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("workers=2", "it is of 4 workers, and the run has 2"),
        ("workers=8", "it is of 4 workers, and the run has 8"),
        ("model.depth=14", "the checkpoint has another architecture"),
        ("extrapolation.name=optimistic", "the extrapolation state belongs to"),
        ("extrapolation.name=none", "it was trained with extrapolation"),
        ("optimizer.name=lars", "the optimizer is another one: it has no dampening"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    change: str, reason: str, images: Path, tmp_path: Path
) -> None:
    run_here(tmp_path / "run", config_of(images, "epochs=1"))
    with pytest.raises(UsageError) as error:
        run_here(tmp_path / "run", config_of(images, change), resume=True)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
