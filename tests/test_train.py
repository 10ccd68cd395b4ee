"""What a run computes and writes down, on the real engine with a tiny net."""

import json
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    EXTRAPOLATIONS,
    STEPS,
    config_of,
    flattened,
    metrics_in,
    newest_checkpoint,
    outcome,
    run_here,
)
from torch import Tensor, nn

from egtrain import build, session
from egtrain.build import build_run
from egtrain.checkpoint import CheckpointStore, read_checkpoint
from egtrain.config.schema import Config
from egtrain.errors import DivergedError, InterruptedRun, UsageError
from egtrain.run import Run
from egtrain.tasks.image import ImageTask
from egtrain.workers import Ranks

pytestmark = pytest.mark.timeout(120)
Undisturbed = Callable[..., dict[str, Any]]


def summary_of(directory: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    return summary


def without_metrics(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "metrics"}


def test_the_same_seed_gives_the_same_run_and_another_one_another(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    assert outcome(run_here(tmp_path / "again", config_of(images))) == undisturbed()
    other = undisturbed("seed=1")
    assert other.keys() == undisturbed().keys()
    assert other["state.model.stem.weight"] != undisturbed()["state.model.stem.weight"]


def test_evaluations_and_checkpoints_change_nothing(undisturbed: Undisturbed) -> None:
    often = undisturbed("checkpoint.every=1", "log.every=5")
    assert without_metrics(often) == without_metrics(undisturbed())
    seldom = undisturbed("evaluate_every=3")
    assert without_metrics(seldom) == without_metrics(undisturbed())
    assert seldom["metrics"][-1] == undisturbed()["metrics"][-1]


def test_metrics_hold_every_step_and_evaluation_once_in_order(undisturbed: Undisturbed) -> None:
    lines = undisturbed()["metrics"]
    expected = [(step, "train") for step in range(1, STEPS + 1)]
    for step in (4, 8, 12):
        expected.insert(expected.index((step, "train")) + 1, (step, "test"))
    assert [(line["step"], line["split"]) for line in lines] == expected
    assert [line["epoch"] for line in lines] == [step / 4 for step, _ in expected]
    assert all(
        math.isfinite(value)
        for line in lines
        for value in line.values()
        if not isinstance(value, str)
    )


def test_the_learning_rate_in_the_metrics_is_the_schedule(
    images: Path, undisturbed: Undisturbed
) -> None:
    rates = [line["learning_rate"] for line in undisturbed()["metrics"] if line["split"] == "train"]
    warmup = [0.1] * 4
    decay = [0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx(warmup + decay)


@pytest.mark.parametrize("extrapolation", list(EXTRAPOLATIONS))
def test_a_second_gradient_is_counted(extrapolation: str, images: Path, tmp_path: Path) -> None:
    directory = run_here(
        tmp_path / "run", config_of(images, "steps=2", extrapolation=extrapolation)
    )
    summary = summary_of(directory)
    assert summary["gradient_evaluations"] == 2 * 32 * (
        2 if extrapolation in ("extragradient", "sam") else 1
    )
    assert (summary["samples"], summary["steps"], summary["batch_size"]) == (64, 2, 32)


@pytest.mark.parametrize("extrapolation", ["extragradient", "sam"])
def test_a_second_gradient_is_taken_and_counted_until_extrapolation_ends(
    extrapolation: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, loss = [], ImageTask.loss

    def counted(self: ImageTask, model: nn.Module, batch: Any) -> Any:
        taken.append(len(batch[1]))
        return loss(self, model, batch)

    monkeypatch.setattr(ImageTask, "loss", counted)
    config = config_of(images, "steps=6", "extrapolation.until=0.5", extrapolation=extrapolation)
    directory = run_here(tmp_path / "run", config)
    assert summary_of(directory)["gradient_evaluations"] == sum(taken) == 32 * (2 * 3 + 3)


def test_without_validation_there_is_no_best(
    undisturbed: Undisturbed, images: Path, tmp_path: Path
) -> None:
    summary = summary_of(run_here(tmp_path / "run", config_of(images, "epochs=1")))
    assert summary["best"] is None
    assert list(summary["final"]) == ["test"]


def test_with_validation_the_best_is_that_of_the_evaluations(images: Path, tmp_path: Path) -> None:
    directory = run_here(
        tmp_path / "run", config_of(images, "data.validation=20", "optimizer.lr=0.3", "epochs=8")
    )
    summary = summary_of(directory)
    measured = {
        line["step"]: line["accuracy"]
        for line in metrics_in(directory)
        if line["split"] == "validation"
    }
    best = max(measured.values())
    first = min(step for step, accuracy in measured.items() if accuracy == best)
    assert len(set(measured.values())) > 1
    assert summary["best"] == {"step": first, "validation": {"accuracy": best}}
    assert list(summary["final"]) == ["validation", "test"]
    # The test split is looked at once, in the end.
    assert [line["step"] for line in metrics_in(directory) if line["split"] == "test"] == [32]
    store = CheckpointStore(directory / "checkpoints")
    assert store.load("best")[0] == first
    kept = sorted(
        int(path.stem.removeprefix("step-")) for path in (directory / "checkpoints").glob("*.pt")
    )
    assert kept == sorted({first, 28, 32})


def test_the_summary_tells_what_was_run(images: Path, tmp_path: Path) -> None:
    directory = run_here(tmp_path / "run", config_of(images, "epochs=1", "seed=3"))
    summary = summary_of(directory)
    (last,) = [line for line in metrics_in(directory) if line["split"] == "test"]
    assert summary["final"] == {"test": {"loss": last["loss"], "accuracy": last["accuracy"]}}
    expected = {
        "name": "run",
        "preset": "quickstart",
        "epochs": 1,
        "workers": 4,
        "ranks": 1,
        "seed": 3,
    }
    assert {key: summary[key] for key in expected} == expected
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["hardware"]["threads"] == 1
    assert summary["hardware"]["device"] == "cpu"


def test_one_worker_trains_like_any_number(images: Path, tmp_path: Path) -> None:
    config = config_of(images, "workers=1", "worker_batch_size=32", "optimizer.lr=0.3", "epochs=8")
    directory = run_here(tmp_path / "run", config)
    losses = [line["loss"] for line in metrics_in(directory) if line["split"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    assert all("noise_scale" not in line for line in metrics_in(directory))


def test_a_longer_run_goes_on_after_its_last_whole_epoch(images: Path, tmp_path: Path) -> None:
    directory = run_here(tmp_path / "run", config_of(images, "steps=6"))
    assert [line["step"] for line in metrics_in(directory) if line["split"] == "test"] == [4, 6]
    assert summary_of(directory)["epochs"] == 1.5


def test_parameter_groups_keep_their_own_rates(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the shared phase, in the local one, and after an interruption in either."""

    def two_groups(settings: Any, model: nn.Module) -> torch.optim.Optimizer:
        head = list(model.get_submodule("head").parameters())
        body = [p for name, p in model.named_parameters() if not name.startswith("head")]
        groups = [{"params": body}, {"params": head, "lr": settings.lr / 8}]
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9)

    rates: list[list[float]] = []
    step = torch.optim.SGD.step

    def noted(self: torch.optim.SGD, closure: None = None) -> None:
        rates.append([group["lr"] for group in self.param_groups])
        step(self, closure)

    monkeypatch.setattr(build, "build_optimizer", two_groups)
    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    config = config_of(images, "post_local.period=3", "post_local.start=0.5")
    whole = outcome(run_here(tmp_path / "whole", config))
    scheduled = [line["learning_rate"] for line in whole["metrics"] if line["split"] == "train"]
    per_update = [*scheduled[:6], *(rate for rate in scheduled[6:] for _ in range(4))]
    assert rates == [[rate, rate / 8] for rate in per_update]

    rates.clear()
    for resume, stop_after in ((False, 3), (True, 5), (True, None)):
        with pytest.raises(InterruptedRun) if stop_after else nullcontext():
            run_here(tmp_path / "run", config, resume=resume, stop_after=stop_after)
    assert rates == [[rate, rate / 8] for rate in per_update]
    assert outcome(tmp_path / "run") == whole


def test_a_checkpoint_is_never_ahead_of_the_metrics_on_the_disk(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut there is a line for every step that a checkpoint has."""
    metrics = tmp_path / "run/metrics.jsonl"
    on_disk: list[int] = [0]
    saved: list[int] = []
    fsync, save = os.fsync, CheckpointStore.save

    def noted_fsync(file: int) -> None:
        fsync(file)
        if metrics.exists() and os.path.samestat(os.fstat(file), metrics.stat()):
            on_disk.append(json.loads(metrics.read_bytes().splitlines()[-1])["step"])

    def noted_save(self: CheckpointStore, state: Any, step: int, **further: Any) -> Path:
        assert on_disk[-1] == step
        saved.append(step)
        return save(self, state, step, **further)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(CheckpointStore, "save", noted_save)
    run_here(tmp_path / "run", config_of(images, "checkpoint.every=3"))
    assert saved == [3, 6, 9, 12]


# ---- numbers that are not finite


class Caught:
    """The run that a session builds."""

    run: Run


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> Caught:
    catch = Caught()

    def build_noted(config: Config, ranks: Ranks, *, anew: bool) -> Run:
        catch.run = build_run(config, ranks, anew=anew)
        return catch.run

    monkeypatch.setattr(session, "build_run", build_noted)
    return catch


def spoil_the_loss(
    monkeypatch: pytest.MonkeyPatch, worker: int, step: int, call: int, by: Callable[..., Any]
) -> None:
    """Change what the n-th forward pass of a worker in a step returns."""
    batch, loss = ImageTask.batch, ImageTask.loss
    at, calls = [(-1, -1)], [0]

    def noted(self: ImageTask, worker: int, step: int) -> Any:
        at[0], calls[0] = (worker, step), 0
        return batch(self, worker, step)

    def spoilt(self: ImageTask, model: nn.Module, samples: Any) -> Any:
        value, metric = loss(self, model, samples)
        calls[0] += 1
        if at[0] == (worker, step) and calls[0] == call:
            value = by(value, model)
        return value, metric

    monkeypatch.setattr(ImageTask, "batch", noted)
    monkeypatch.setattr(ImageTask, "loss", spoilt)


def times(number: float) -> Callable[[Tensor, nn.Module], Tensor]:
    return lambda loss, model: loss * number


def with_a_bad_gradient(loss: Tensor, model: nn.Module) -> Tensor:
    """Return the same loss, whose gradient is not a number: the derivative of a square root at
    zero, times zero.
    """
    weight = next(model.parameters())
    bad: Tensor = loss + (weight * 0).square().sum().sqrt()
    return bad


NAN = "the loss of worker 2 became nan at step 3"


@pytest.mark.parametrize(
    ("extrapolation", "call", "by", "message"),
    [
        ("none", 1, times(math.nan), NAN),
        ("local", 1, times(math.nan), NAN),
        ("local", 1, times(math.inf), "the loss of worker 2 became inf at step 3"),
        ("local", 1, with_a_bad_gradient, "the gradient of worker 2 became nan at step 3"),
        ("sam", 2, times(math.nan), NAN),
        ("extragradient", 2, times(math.nan), NAN),
        ("sam", 1, times(math.nan), NAN),
        ("extragradient", 1, times(math.nan), NAN),
    ],
)
def test_a_worker_whose_loss_is_not_finite_stops_the_run_before_the_update(
    extrapolation: str,
    call: int,
    by: Callable[..., Any],
    message: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caught: Caught,
) -> None:
    """For the variants of two gradients the second pass is the one at the shifted weights."""
    spoil_the_loss(monkeypatch, worker=2, step=2, call=call, by=by)
    with pytest.raises(DivergedError) as error:
        run_here(
            tmp_path / "run", config_of(images, "checkpoint.every=1", extrapolation=extrapolation)
        )
    assert str(error.value).startswith(message)
    assert "optimizer.lr" in str(error.value)
    assert error.value.exit_code == 4

    step, state = read_checkpoint(newest_checkpoint(tmp_path / "run"))
    assert step == 2
    tensors = {name: value for name, value in flattened(state).items() if isinstance(value, Tensor)}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    assert [line["step"] for line in metrics_in(tmp_path / "run")] == [1, 2]
    for name, parameter in caught.run.model.named_parameters():
        assert torch.equal(parameter, state["model"][name]), name
    assert not (tmp_path / "run/summary.json").exists()


def test_a_run_that_diverged_can_go_on_at_a_lower_rate(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        run_here(
            tmp_path / "run",
            config_of(images, "optimizer.lr=1e30", "checkpoint.every=1", extrapolation="none"),
        )
    assert newest_checkpoint(tmp_path / "run").exists()
    step, state = read_checkpoint(newest_checkpoint(tmp_path / "run"))
    assert step < STEPS
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state["model"].values())


def test_statistics_of_workers_are_their_own(images: Path, tmp_path: Path) -> None:
    """The model of a checkpoint has their mean, and each worker has had other samples."""
    directory = run_here(tmp_path / "run", config_of(images))
    _, state = read_checkpoint(newest_checkpoint(directory))
    own = state["workers"]["buffers"]
    assert len(own) == 4
    assert len({tuple(row.tolist()) for row in own}) == 4
    names = [name for name in state["model"] if "running" in name]
    mean = torch.cat([state["model"][name] for name in names])
    torch.testing.assert_close(mean, own.mean(dim=0), rtol=0, atol=0)


def test_a_batch_larger_than_the_data_is_refused_and_the_directory_stays_free(
    images: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UsageError, match=r"a batch of 32 x 8 = 256 is larger than the 150 training samples: take"
    ):
        run_here(tmp_path / "run", config_of(images, "workers=32"))
    run_here(tmp_path / "run", config_of(images, "steps=1"))
