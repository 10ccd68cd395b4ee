"""Post-local SGD: workers share updates first, then make their own and average their weights."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import arguments, config_of, metrics_in, outcome, run_here, run_on_ranks
from reference import Base, Reference, Zeta
from tiny_run import RATES, TinyTask, tiny_net, tiny_run, train_watched
from torch import Tensor

from egtrain.build import build_run
from egtrain.checkpoint import read_checkpoint
from egtrain.errors import DivergedError, InterruptedRun
from egtrain.optim import Direction, LocalGradient
from egtrain.optim.post_local import PostLocal
from egtrain.optim.randomness import generator_for, seed_for
from egtrain.run import Run
from egtrain.train import take_step
from egtrain.workers import Ranks

pytestmark = pytest.mark.timeout(120)
Undisturbed = Callable[..., dict[str, Any]]

WORKERS, SEED = 4, 3
LOCAL = ("post_local.period=3", "post_local.start=0.334")
"""Of the twelve steps of a small run, the first four are shared, and weights are averaged after 7
and 10."""


def post_local_run(
    base: Base, start: int, period: int, direction: Direction | None = None, **settings: Any
) -> Run:
    """Return the tiny run with a local phase."""
    run = tiny_run(direction, base, workers=WORKERS, seed=SEED, until=start, **settings)
    run.post_local = PostLocal(run.optimizer, run.workers.carried, start=start, period=period)
    return run


class NaivePostLocal:
    """The shared phase by the naive reference, and then one naive reference of a single worker for
    each.
    """

    def __init__(self, base: Base, zeta: Zeta, start: int, period: int) -> None:
        self.task = TinyTask(WORKERS, torch.float64)
        self.base, self.start, self.period = base, start, period
        self.shared = self.reference(zeta, range(WORKERS))
        self.own: list[Reference] = []
        self.steps = 0

    def reference(self, zeta: Zeta, workers: range) -> Reference:
        first = workers.start
        return Reference(
            tiny_net(),
            len(workers),
            zeta,
            self.base,
            loss=lambda model, batch: self.task.loss(model, batch)[0],
            batch=lambda worker, step: self.task.batch(first + worker, step),
            extra_batch=lambda worker, step: self.task.extra_batch(first + worker, step),
            generator=lambda worker, step: generator_for(
                SEED, "extrapolation", first + worker, step
            ),
            dropout_seed=lambda worker, step: seed_for(SEED, "dropout", first + worker, step),
        )

    def step(self, learning_rate: float) -> list[list[Tensor]]:
        """Make one update and return every worker's weights."""
        if self.steps < self.start:
            self.shared.step(learning_rate)
            self.steps += 1
            return [self.shared.weights] * WORKERS
        if self.steps == self.start:
            for worker in range(WORKERS):
                own = self.reference(Zeta(), range(worker, worker + 1))
                own.weights = self.shared.weights
                own.models = [copy.deepcopy(self.shared.models[worker])]
                own.velocity = copy.deepcopy(self.shared.velocity)
                own.steps = self.steps
                self.own.append(own)
        for own in self.own:
            own.step(learning_rate)
        self.steps += 1
        if (self.steps - self.start) % self.period == 0:
            mean = [
                sum(parts[1:], parts[0]) / WORKERS
                for parts in zip(*(own.weights for own in self.own), strict=True)
            ]
            for own in self.own:
                own.weights = mean
        return [own.weights for own in self.own]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize(
    ("base", "direction", "zeta", "start", "period"),
    [
        (Base(), None, Zeta(), 3, 2),
        (Base(), None, Zeta(), 0, 3),
        (Base(momentum=0.0, nesterov=False), None, Zeta(), 2, 1),
        (Base(nesterov=False, clip_norm=0.3), None, Zeta(), 4, 100),
        (Base(clip_norm=0.5), LocalGradient(ratio=0.25), Zeta("local", ratio=0.25), 4, 2),
    ],
    ids=[
        "Nesterov",
        "from the first step",
        "plain, every step",
        "clipped, never averaged",
        "extrapolated before",
    ],
)
def test_the_engine_agrees_with_the_naive_reference_step_by_step(
    base: Base, direction: Direction | None, zeta: Zeta, start: int, period: int
) -> None:
    naive = NaivePostLocal(base, zeta, start, period)
    run = post_local_run(base, start, period, direction)

    def compare(step: int, metrics: dict[str, float]) -> None:
        expected = torch.stack([flat(weights) for weights in naive.step(RATES[step - 1])])
        found = run.workers.state_dict()["parameters"]
        if found is None:
            assert step <= start
            found = run.workers.parameters.detach().expand(WORKERS, -1)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
        assert ("gradient_norm" in metrics) == (step <= start)

    train_watched(run, compare)
    # What is evaluated and saved in the end is the mean of the workers' weights.
    final = torch.stack([flat(own.weights) for own in naive.own]).mean(dim=0)
    torch.testing.assert_close(run.workers.parameters.detach(), final, rtol=1e-11, atol=1e-12)


def test_averaging_plain_steps_each_time_is_mini_batch_training() -> None:
    """The mean of x − γ·g^k is x − γ·ḡ."""
    base = Base(momentum=0.0, nesterov=False)
    local, shared = post_local_run(base, 2, 1), tiny_run(None, base, workers=WORKERS, seed=SEED)
    train_watched(local)
    train_watched(shared)
    torch.testing.assert_close(
        local.workers.parameters, shared.workers.parameters, rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("evaluate_every", [1, 2])
def test_looking_at_the_mean_in_the_middle_of_a_period_changes_nothing(evaluate_every: int) -> None:
    undisturbed, watched = post_local_run(Base(), 2, 3), post_local_run(Base(), 2, 3)
    watched.evaluate_every = evaluate_every
    watched.checkpoint_every = 1
    train_watched(undisturbed)
    train_watched(watched)
    assert torch.equal(undisturbed.workers.parameters, watched.workers.parameters)


def test_synchronisations_are_those_of_the_shared_steps_and_of_the_averages() -> None:
    run = post_local_run(Base(), start=2, period=3)
    counted: list[float] = []
    train_watched(run, lambda step, metrics: counted.append(metrics["synchronisations"]))
    assert counted == [1, 2, 2, 2, 3, 3, 3, 4]
    assert tiny_run(None, Base()).synchronisations(8) == 8


@pytest.mark.parametrize(("start", "period"), [(0, 1), (0, 3), (4, 1), (4, 3), (6, 2)])
def test_weights_are_averaged_after_each_period_and_not_where_the_first_begins(
    start: int, period: int
) -> None:
    post_local = PostLocal(
        torch.optim.SGD([torch.zeros(1)], lr=0.1), range(2), start=start, period=period
    )
    averaged = [step for step in range(20) if post_local.averages_after(step)]
    assert averaged == list(range(start + period, 20, period))
    assert [post_local.averages(step) for step in range(20)] == [
        sum(a <= step for a in averaged) for step in range(20)
    ]


def test_a_gradient_that_is_not_finite_ends_the_run_and_spoils_nobody_elses_weights() -> None:
    run = post_local_run(Base(), start=1, period=4)
    for rate in RATES[:3]:
        take_step(run, rate)
    before = run.workers.state_dict()["parameters"]
    assert before is not None
    loss = run.task.loss
    taken: list[int] = []

    def broken(model: torch.nn.Module, batch: Any) -> Any:
        taken.append(1)
        value, metric = loss(model, batch)
        return (value * float("nan") if len(taken) == 2 else value), metric

    run.task.loss = broken  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match="the loss of worker 1 became nan at step 4"):
        train_watched(run)
    after = run.workers.state_dict()["parameters"]
    assert after is not None
    assert torch.isfinite(after).all()
    assert torch.equal(after[1], before[1])


@pytest.mark.parametrize(("start", "period"), [(-1, 2), (0, 0), (3, -1)])
def test_a_start_or_period_that_makes_no_sense_is_refused(start: int, period: int) -> None:
    optimizer = torch.optim.SGD(tiny_net().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="start must be at least 0 and period at least 1"):
        PostLocal(optimizer, range(2), start=start, period=period)


def test_the_workers_optimizers_begin_as_copies_of_the_shared_one_and_share_its_parameters() -> (
    None
):
    net = tiny_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    flat(list(net.parameters())).sum().backward()
    optimizer.step()
    post_local = PostLocal(optimizer, range(2, 4), start=0, period=2)
    post_local.begin()
    assert list(post_local.optimizers) == [2, 3]
    for own in post_local.optimizers.values():
        assert own.param_groups[0]["params"][0] is net.gain
        assert own.state[net.gain]["exp_avg"] is not optimizer.state[net.gain]["exp_avg"]
        torch.testing.assert_close(own.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    post_local.optimizers[3].step()
    saved = post_local.state_dict()
    assert saved["0.step"].tolist() == [1, 2]
    again = PostLocal(optimizer, range(2, 4), start=0, period=2)
    again.load_state_dict(saved)
    torch.testing.assert_close(again.state_dict(), saved, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_gives_the_same_local_phase_bit_for_bit(
    ranks: int, images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    run_on_ranks([*arguments(images, *LOCAL), "--output", "run"], tmp_path, ranks)
    assert outcome(tmp_path / "run") == undisturbed(*LOCAL)


@pytest.mark.parametrize(
    "step", [3, 4, 5, 7, 9], ids=["before", "at the start", "after", "at an average", "between"]
)
def test_a_run_goes_on_where_it_was_in_both_phases(
    step: int, images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    config = config_of(images, *LOCAL)
    with pytest.raises(InterruptedRun):
        run_here(tmp_path / "run", config, stop_after=step)
    assert outcome(tmp_path / "run")["step"] == step
    if step == 5:
        run_on_ranks(["train", "--resume", "run"], tmp_path, 2)
    else:
        run_here(tmp_path / "run", config, resume=True)
    assert outcome(tmp_path / "run") == undisturbed(*LOCAL)


@pytest.mark.parametrize(
    ("before", "after"),
    [(LOCAL, ()), (LOCAL, (*LOCAL, "post_local.start=0.9")), ((), LOCAL)],
    ids=["no more", "later", "already begun"],
)
def test_a_run_goes_on_where_its_local_phase_was_moved(
    before: tuple[str, ...], after: tuple[str, ...], images: Path, tmp_path: Path
) -> None:
    with pytest.raises(InterruptedRun):
        run_here(tmp_path / "run", config_of(images, *before), stop_after=7)
    (file,) = (tmp_path / "run/checkpoints").glob("step-00000007.pt")
    then = read_checkpoint(file)[1]["model"]
    run_here(tmp_path / "run", config_of(images, *after), resume=True)
    last = read_checkpoint(tmp_path / "run/checkpoints/step-00000012.pt")[1]
    assert last["step"] == 12
    assert not torch.equal(last["model"]["stem.weight"], then["stem.weight"])
    # The steps after it start from the mean of the workers' weights, not anew.
    change = torch.linalg.vector_norm(last["model"]["stem.weight"] - then["stem.weight"])
    assert change < torch.linalg.vector_norm(then["stem.weight"])


def test_a_local_phase_is_another_run_with_fewer_synchronisations(
    images: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    local, shared = undisturbed(*LOCAL)["metrics"], undisturbed()["metrics"]
    assert local[:4] != shared[:4]
    assert local[3]["loss"] == shared[3]["loss"]
    assert local[-1]["loss"] != shared[-1]["loss"]
    directory = run_here(tmp_path / "run", config_of(images, *LOCAL))
    assert json.loads((directory / "summary.json").read_text())["synchronisations"] == 4 + 2
    sizes = [
        line["extrapolation_size"] for line in metrics_in(directory) if line["split"] == "train"
    ]
    assert [size > 0 for size in sizes] == [1 <= step < 4 for step in range(12)]


def test_the_first_decay_starts_the_local_phase(images: Path) -> None:
    config = config_of(
        images, "post_local.period=2", "schedule.decay=step", "schedule.milestones=[0.25,0.75]"
    )
    run = build_run(config, Ranks())
    assert run.post_local is not None
    assert (run.post_local.start, run.post_local.period) == (3, 2)
    assert run.extrapolated_steps == range(3)
