"""A user's direction: the engine keeps, saves and gathers its state without knowing it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import config_of, on_two_ranks, process_group, torch_as_it_was
from own_directions import AverageOfGradients, AverageOfUpdates
from reference import Base
from tiny_run import tiny_run, train_watched
from torch import Tensor, nn

from egtrain.build import build_direction, build_run
from egtrain.config.extrapolations import SECTIONS
from egtrain.config.schema import Config
from egtrain.optim import Direction, Extrapolation, Point, State
from egtrain.run import Run
from egtrain.train import take_step
from egtrain.workers import Ranks

OWN = {
    "average of updates": AverageOfUpdates(factor=0.5, decay=0.7, peak_rate=0.2),
    "average of gradients": AverageOfGradients(ratio=0.5, decay=0.6),
}


def run_of(name: str, ranks: Ranks, steps: int = 6) -> Run:
    return tiny_run(OWN[name], Base(), workers=4, steps=steps, ranks=ranks)


def states_on_two_ranks() -> dict[str, Any]:
    """Return what each run saves after 3 of its 6 steps."""
    states = {}
    with process_group():
        for name in OWN:
            run = run_of(name, Ranks(int(os.environ["RANK"]), 2), steps=3)
            train_watched(run)
            states[name] = run.state_dict()
    return states


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    states: dict[str, Any] = on_two_ranks(states_on_two_ranks, tmp_path_factory.mktemp("own"))[0]
    return states


@pytest.mark.parametrize("name", OWN)
def test_its_state_is_the_same_on_any_number_of_ranks(name: str, saved: dict[str, Any]) -> None:
    alone = run_of(name, Ranks(), steps=3)
    train_watched(alone)
    expected, found = alone.state_dict()["extrapolation"], saved[name]["extrapolation"]
    assert found.keys() == expected.keys()
    for part in ("worker_state", "shared_state"):
        assert found[part].keys() == expected[part].keys()
        for key, tensors in expected[part].items():
            assert any(t.any() for t in tensors)
            for a, b in zip(found[part][key], tensors, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("name", OWN)
def test_what_two_ranks_saved_goes_on_on_one(name: str, saved: dict[str, Any]) -> None:
    undisturbed, resumed = run_of(name, Ranks()), run_of(name, Ranks())
    train_watched(undisturbed)
    resumed.load_state_dict(saved[name])
    train_watched(resumed)
    assert torch.equal(resumed.workers.parameters, undisturbed.workers.parameters)


def weights_resumed_on_two_ranks() -> dict[str, Tensor]:
    """Return the final state of each run that one rank began and two continued."""
    weights = {}
    with process_group():
        for name in OWN:
            alone = run_of(name, Ranks(), steps=3)
            train_watched(alone)
            run = run_of(name, Ranks(int(os.environ["RANK"]), 2))
            run.load_state_dict(alone.state_dict())
            train_watched(run)
            weights[name] = run.workers.parameters.detach().clone()
    return weights


def test_what_one_rank_saved_goes_on_on_two(tmp_path: Path) -> None:
    for weights in on_two_ranks(weights_resumed_on_two_ranks, tmp_path):
        for name in OWN:
            undisturbed = run_of(name, Ranks())
            train_watched(undisturbed)
            assert torch.equal(weights[name], undisturbed.workers.parameters)


def test_a_state_has_one_tensor_a_parameter() -> None:
    class Forgetful(Direction):
        def worker_state(self, parameters: list[Tensor]) -> State:
            return {"scale": [torch.ones(())]}

        def zeta(self, at: Point) -> list[Tensor]:
            return [torch.zeros_like(x) for x in at.parameters]

    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="1 tensors of 'scale' for 2 parameters: keep one for"):
        Extrapolation(optimizer, Forgetful())


def test_it_is_told_the_worker_and_the_step() -> None:
    seen = []

    class Watched(Direction):
        def zeta(self, at: Point) -> list[Tensor]:
            seen.append((at.worker, at.step))
            return [torch.zeros_like(x) for x in at.parameters]

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    extrapolation = Extrapolation(optimizer, Watched(), workers=range(3, 5))
    for _ in range(2):
        for worker in (3, 4):
            with extrapolation.shifted(worker):
                torch.autograd.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
    assert seen == [(3, 0), (4, 0), (3, 1), (4, 1)]


def test_an_update_is_observed_from_the_weights_before_it_to_those_after() -> None:
    """Also one that no block was before, and one after the weights were changed by hand."""
    updates = []

    class Watching(Direction):
        def shared_state(self, parameters: list[Tensor]) -> State:
            return {"nothing": [torch.zeros(()) for _ in parameters]}

        def observe_update(self, state: State, before: list[Tensor], after: list[Tensor]) -> None:
            updates.append((before[0].clone(), after[0].clone()))

        def zeta(self, at: Point) -> list[Tensor]:
            return [torch.ones_like(x) for x in at.parameters]

    weights = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weights], lr=0.5)
    extrapolation = Extrapolation(optimizer, Watching())
    weights.grad = torch.ones(1)
    with extrapolation.shifted():
        pass
    optimizer.step()
    optimizer.step()
    with torch.no_grad():
        weights.fill_(8.0)
    optimizer.step()
    assert updates == [(1.0, 0.5), (0.5, 0.0), (8.0, 7.5)]


def test_the_examples_of_the_docstring_are_directions() -> None:
    lines = [
        line.strip()[4:]
        for line in (Direction.__doc__ or "").splitlines()
        if line.strip().startswith((">>>", "..."))
    ]
    names: dict[str, Any] = {"torch": torch, "Direction": Direction}
    exec("\n".join(lines), names)
    for name in ("AgainstWeights", "AverageOfGradients"):
        weights = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weights], lr=0.1)
        extrapolation = Extrapolation(optimizer, names[name]())
        for _ in range(2):
            before = weights.detach().clone()
            with extrapolation.shifted():
                shifted = weights.detach().clone()
                optimizer.zero_grad()
                torch.autograd.backward(weights.square().sum())
            optimizer.step()
        assert not torch.equal(shifted, before)
        resumed = Extrapolation(optimizer, names[name]())
        resumed.load_state_dict(extrapolation.state_dict())
        assert resumed.steps == 2


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "none"])
def test_a_row_of_the_configuration_builds_the_direction_of_its_name(name: str) -> None:
    keys = {key: 0.5 for key, info in SECTIONS[name].model_fields.items() if info.is_required()}
    momentum = {"optimizer": {"name": "sgd", "nesterov": False}}
    config = Config.model_validate({**momentum, "extrapolation": {"name": name, **keys}})
    direction = build_direction(config)
    assert isinstance(direction, Direction)
    assert type(direction).__module__ == f"egtrain.optim.directions.{name.replace('-', '_')}"
    # One step in so many is for directions whose second gradient is saved by it.
    assert (direction.gradients == 2) == ("every" in SECTIONS[name].model_fields)


def test_a_run_keeps_the_weights_before_a_step_once(images: Path) -> None:
    with torch_as_it_was():
        run = build_run(config_of(images), Ranks())
        take_step(run, 0.1)
    assert run.extrapolation is not None
    kept = {t.untyped_storage().data_ptr() for t in run.extrapolation._weights._kept}
    assert kept == {run.workers._parameters_before.untyped_storage().data_ptr()}
