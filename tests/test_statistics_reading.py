"""On a GPU the host reads a step's statistics one step late; what a run does must not depend on
it.
"""

import math

import pytest
import torch
from reference import Base
from tiny_run import tiny_run, train_watched
from torch import Tensor, nn

from egtrain.errors import DivergedError
from egtrain.optim import LocalGradient

BASE = Base()


def train_with_lag(lag: int, **changes: int) -> tuple[list[tuple[int, dict[str, float]]], Tensor]:
    run = tiny_run(LocalGradient(ratio=0.5), BASE)
    run.unread_steps = lag
    for name, value in changes.items():
        setattr(run, name, value)
    seen: list[tuple[int, dict[str, float]]] = []
    train_watched(run, lambda step, metrics: seen.append((step, metrics)))
    return seen, run.workers.parameters.clone()


def test_metrics_and_weights_are_the_same_with_a_step_unread() -> None:
    at_once, weights_at_once = train_with_lag(0)
    late, weights_late = train_with_lag(1)
    assert late == at_once
    assert torch.equal(weights_late, weights_at_once)


def test_nothing_is_unread_at_an_evaluation_or_checkpoint() -> None:
    at_once, _ = train_with_lag(0, evaluate_every=3, checkpoint_every=2)
    late, _ = train_with_lag(1, evaluate_every=3, checkpoint_every=2)
    assert late == at_once


@pytest.mark.parametrize("lag", [0, 1])
def test_a_loss_that_is_not_finite_leaves_the_weights_before_it(
    lag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(LocalGradient(ratio=0.5), BASE)
    run.unread_steps = lag
    before: list[Tensor] = []
    plain_loss = run.task.loss

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        value, metric = plain_loss(model, batch)
        # Step 3 (the fourth), worker 2 only.
        if run.step == 3 and calls["in step"] == 2:
            value = value * math.nan
        calls["in step"] += 1
        return value, metric

    calls = {"in step": 0}
    begin_step = run.workers.begin_step

    def begin() -> None:
        calls["in step"] = 0
        if run.step == 3:
            before.append(run.workers.parameters.clone())
        begin_step()

    monkeypatch.setattr(run.task, "loss", loss)
    monkeypatch.setattr(run.workers, "begin_step", begin)
    with pytest.raises(DivergedError, match="worker 2 became nan at step 4"):
        train_watched(run)
    assert torch.equal(run.workers.parameters, before[0])
    assert torch.isfinite(run.workers.parameters).all()
