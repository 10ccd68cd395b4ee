"""Parameters that are maximised, converted, added, frozen, cached, or have no gradient."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from naive_loop import (
    DIRECTIONS,
    Trajectory,
    Vectors,
    assert_same,
    base_of,
    flat,
    loss_of,
    network,
    train_naively,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from egtrain.optim import (
    SAM,
    Direction,
    Extragradient,
    Extrapolation,
    GaussianNoise,
    GradientNoise,
    LocalGradient,
    OptimisticGradient,
)

NAMES = list(DIRECTIONS)


# Maximised.


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        # 1 − x: 1, 0.8, 0.8 − 0.2·(0.6), 0.68 − 0.2·(0.56), 0.568 − 0.2·(0.456)
        (LocalGradient(ratio=1.0), 0.5232),
        (OptimisticGradient(ratio=1.0), 0.5232),
        # 1 − x shrinks by 1 − 0.2·0.8
        (Extragradient(ratio=1.0), 1 - 0.84**4),
        # x moves by 0.2·(1.1 − x)
        (SAM(radius=0.1), 1.1 * (1 - 0.8**4)),
        # 1 − x shrinks by 0.8
        (GradientNoise(ratio=1.0), 1 - 0.8**4),
    ],
    ids=["local", "optimistic", "extragradient", "sam", "gradient-noise"],
)
@pytest.mark.parametrize("foreach", [False, True])
def test_four_steps_of_a_maximum_by_hand(
    direction: Direction, expected: float, foreach: bool
) -> None:
    x = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=0.1, maximize=True, foreach=foreach)
    extrapolation = Extrapolation(optimizer, direction)

    def backward() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(-((x - 1) ** 2))

    for _ in range(4):
        with extrapolation.shifted(gradient=backward):
            backward()
        optimizer.step()
    assert x.item() == pytest.approx(expected, abs=1e-14)


def mixed(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer that maximises in the first layer and minimises in the second."""
    groups: list[dict[str, Any]] = [
        {"params": list(model[0].parameters()), "maximize": True, "lr": 0.05},
        {"params": list(model[2].parameters()), "lr": 0.1},
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_groups_that_maximise_and_minimise_share_an_optimizer(name: str, workers: int) -> None:
    model = network()
    optimizer = mixed(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name], workers)
    found, blocks = [], (1, 2, 1, 3)
    for update, count in enumerate(blocks):
        gradients = []
        for k in range(workers):
            optimizer.zero_grad()
            for block in range(count):

                def backward(k: int = k, update: int = update, block: int = block) -> None:
                    torch.autograd.backward(loss_of(model, k, update, block))

                with extrapolation.shifted(k, gradient=backward):
                    backward()
            gradients.append([p.grad for p in model.parameters()])
        for p, *own in zip(model.parameters(), *gradients, strict=True):
            p.grad = torch.stack(own).mean(dim=0)
        optimizer.step()
        found.append(flat(model))
    assert_same(found, train_naively(name, blocks, workers=workers, base=mixed))


# Another type or device after construction.


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_another_type_than_at_first_comes_back_as_it_was(
    name: str, first: torch.dtype
) -> None:
    model = network().to(first)
    optimizer = base_of(name)(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name])
    model.float()
    with torch.no_grad():
        model[0].weight.fill_(1.001)
    before = flat(model)

    def backward() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(model(torch.ones(2, 3)).square().sum())

    for _ in range(2):
        with extrapolation.shifted(gradient=backward):
            backward()
        assert torch.equal(flat(model), before)
    assert model[0].weight[0, 0].item() == torch.tensor(1.001).item()
    optimizer.step()
    assert flat(model).dtype == torch.float32
    for part in ("worker_state", "shared_state"):
        for tensors in extrapolation.state_dict()[part].values():
            assert {t.dtype for t in tensors} == {torch.float32}


@pytest.mark.parametrize("name", ["local", "optimistic", "gradient-noise", "average of updates"])
def test_state_follows_a_change_of_type(name: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name])

    def update(number: int) -> None:
        optimizer.zero_grad()
        with extrapolation.shifted():
            dtype = model[0].weight.dtype
            loss = model(torch.ones(2, 3, dtype=dtype) * (number + 1)).square().sum()
            torch.autograd.backward(loss)
        optimizer.step()

    update(0)
    state = extrapolation.state_dict()
    model.to(torch.float32)
    before = flat(model)
    with extrapolation.shifted():
        zeta = before - flat(model)
        torch.autograd.backward(model(torch.ones(2, 3)).square().sum())
    assert torch.equal(flat(model), before)
    if name != "gradient-noise":  # with one worker there is none
        assert zeta.abs().max() > 1e-4
    for part in ("worker_state", "shared_state"):
        for key, tensors in extrapolation.state_dict()[part].items():
            for t, old in zip(tensors, state[part][key], strict=True):
                assert t.dtype == torch.float32
                torch.testing.assert_close(t, old.float(), rtol=1e-6, atol=0)
    update(1)
    model.double()
    update(2)
    assert flat(model).dtype == torch.float64


def test_weights_converted_between_the_blocks_of_an_update_are_not_confused() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=1.0), workers=2)
    with extrapolation.shifted(0):
        torch.autograd.backward(loss_of(model, 0, 0, 0))
    model.float()  # its gradients too
    before = flat(model)
    with contextlib.suppress(RuntimeError):
        with extrapolation.shifted(1):
            torch.autograd.backward(model(torch.ones(2, 3)).square().sum())
        optimizer.step()
        return
    assert torch.equal(flat(model), before)


# Nothing, or not everything, has a gradient.


class TwoHeads(nn.Module):
    """Each loss goes through one of two heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Linear(3, 4).double()
        self.heads = nn.ModuleList(nn.Linear(4, 2).double() for _ in range(2))


def loss_of_a_head(model: nn.Module, worker: int, update: int, block: int) -> Tensor:
    head = model.heads[update % 2 if update < 4 else 0]
    return loss_of(nn.Sequential(model.body, nn.Tanh(), head), worker, update, block)


def a_group_each(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    parts = (model.body, *model.heads)
    return torch.optim.SGD([{"params": list(p.parameters())} for p in parts], lr=0.1, **options)


@pytest.mark.parametrize("none", [True, False], ids=["to None", "to zero"])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("msam", "average of updates")]
)
def test_a_group_without_a_gradient_has_none_to_go_along(
    name: str, workers: int, none: bool
) -> None:
    """Without momentum, so that leaving it out and a step of zero are the same."""
    model = TwoHeads()
    optimizer = a_group_each(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name], workers)
    found, blocks = [], (1, 2, 1, 2, 1, 1)
    for update, count in enumerate(blocks):
        optimizer.zero_grad(set_to_none=none)
        for block in range(count):
            for k in range(workers):

                def backward(k: int = k, update: int = update, block: int = block) -> None:
                    torch.autograd.backward(loss_of_a_head(model, k, update, block) / workers)

                with extrapolation.shifted(k, gradient=backward):
                    backward()
        optimizer.step()
        found.append(flat(model))
    expected = train_naively(
        name,
        blocks,
        workers=workers,
        model=TwoHeads,
        loss=lambda *at: loss_of_a_head(*at) / workers,
        base=a_group_each,
        clip=lambda gradients: [workers * g for g in gradients],
        share=1 / workers,
    )
    assert_same(found, expected)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_block_without_any_gradient_is_an_error(name: str, workers: int) -> None:
    model = network()
    optimizer = base_of(name)(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name], workers)
    before = flat(model)
    with (
        pytest.raises(RuntimeError, match="gradient"),
        extrapolation.shifted(0, gradient=lambda: None),
    ):
        pass
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("name", [name for name in NAMES if DIRECTIONS[name].gradients == 1])
def test_a_block_that_adds_nothing_to_earlier_gradients_is_no_update_of_zeros(name: str) -> None:
    """The forgotten backward() of a loop that zeroes in place: an error, or what step() does."""
    model = network()
    optimizer = base_of(name)(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name])
    with extrapolation.shifted():
        torch.autograd.backward(loss_of(model, 0, 0, 0))
    optimizer.step()
    with contextlib.suppress(RuntimeError):
        optimizer.zero_grad(set_to_none=False)
        with extrapolation.shifted():
            pass
        optimizer.step()
    assert flat(model).isfinite().all()


@pytest.mark.parametrize("added", [False, True])
def test_parameters_that_come_inside_a_block_are_refused(added: bool) -> None:
    """They would get a gradient at shifted weights of the others, and none of their own."""
    model = network()
    first, last = list(model[0].parameters()), list(model[2].parameters())
    optimizer = torch.optim.SGD(last if added else [*first, *last], lr=0.1)
    extrapolation = Extrapolation(optimizer, DIRECTIONS["local"])
    before = flat(model)
    model[0].requires_grad_(added)

    def take_in() -> None:
        model[0].requires_grad_(True)
        if added:
            optimizer.add_param_group({"params": first})
        torch.autograd.backward(loss_of(model, 0, 0, 0))

    refused = pytest.raises(RuntimeError, match="added or unfrozen in the shifted")
    with refused, extrapolation.shifted():
        take_in()
    assert torch.equal(flat(model), before)
    optimizer.zero_grad()
    with extrapolation.shifted():
        torch.autograd.backward(loss_of(model, 0, 0, 0))
    optimizer.step()


def test_parameters_may_be_frozen_again_inside_a_block() -> None:
    """As Lightning's toggle_model() does with those of other optimizers."""
    model = network()
    optimizer = base_of("local")(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS["local"])
    found = []
    for update in range(4):
        optimizer.zero_grad()
        model.requires_grad_(True)
        with extrapolation.shifted():
            torch.autograd.backward(loss_of(model, 0, update, 0))
            model.requires_grad_(False)
        optimizer.step()
        found.append(flat(model))
    assert_same(found, train_naively("local", (1,) * 4))


def test_frozen_parameters_are_not_seen_by_directions() -> None:
    seen = []

    class Watching(Direction):
        def zeta(self, at: Any) -> Vectors:
            seen.append([p.requires_grad for p in at.parameters])
            return [torch.zeros_like(x) for x in at.parameters]

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    extrapolation = Extrapolation(optimizer, Watching())
    for frozen in (0, 2, 1, 0):
        for i, p in enumerate(model.parameters()):
            p.requires_grad_(i >= frozen)
        optimizer.zero_grad()
        with extrapolation.shifted():
            torch.autograd.backward(loss_of(model, 0, 0, 0))
        optimizer.step()
    assert seen == [[True] * n for n in (4, 2, 3, 4)]


# Added, frozen and unfrozen after construction.

Change = Callable[[nn.Module, torch.optim.Optimizer], None]


def freeze(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model[0].requires_grad_(False)


def unfreeze(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model[0].requires_grad_(True)


def add(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.05})


def nothing(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    pass


PLANS: dict[str, tuple[bool, dict[int, Change]]] = {
    "a group is added": (False, {2: add}),
    "frozen from the first and unfrozen": (True, {0: freeze, 2: unfreeze}),
    "frozen and unfrozen": (True, {1: freeze, 3: unfreeze}),
    "frozen": (True, {2: freeze}),
}
"""Whether the optimizer has the first layer at first, and what is changed before which update."""


def first_optimizer(model: nn.Module, everything: bool) -> torch.optim.Optimizer:
    layers = [model[2], model[0]] if everything else [model[2]]
    return torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.1)


def train_changing(name: str, plan: str) -> Trajectory:
    everything, changes = PLANS[plan]
    model = network()
    changes = dict(changes)
    optimizer = first_optimizer(model, everything)
    if 0 in changes:
        changes.pop(0)(model, optimizer)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name])
    found = []
    for update in range(5):
        changes.get(update, nothing)(model, optimizer)
        model.zero_grad()
        for block in range(2):

            def backward(update: int = update, block: int = block) -> None:
                torch.autograd.backward(loss_of(model, 0, update, block))

            with extrapolation.shifted(gradient=backward):
                backward()
        optimizer.step()
        found.append(flat(model))
    return found


def train_changing_naively(name: str, plan: str) -> Trajectory:
    """Do it with a past gradient, or an average update, for each parameter by itself."""
    everything, changes = PLANS[plan]
    model = network()
    optimizer = first_optimizer(model, everything)
    past: dict[Tensor, Tensor] = {}
    found = []
    for update in range(5):
        changes.get(update, nothing)(model, optimizer)
        rates = {
            p: group["lr"]
            for group in optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        }
        past = {p: past.get(p, torch.zeros_like(p)) for p in rates}
        x = {p: p.detach().clone() for p in rates}
        total = {p: torch.zeros_like(p) for p in rates}
        for block in range(2):
            if name == "average of updates":
                zeta = {p: -1.5 * past[p] for p in rates}
            elif name == "extragradient":
                gs = torch.autograd.grad(loss_of(model, 0, update, block), list(rates))
                zeta = {p: 0.5 * rates[p] * g for p, g in zip(rates, gs, strict=True)}
            elif name == "gradient-noise":
                zeta = {p: 0 * p for p in rates}
            else:
                zeta = {p: 0.5 * rates[p] * past[p] for p in rates}
            with torch.no_grad():
                for p in rates:
                    p.copy_(x[p] - zeta[p])
            gs = torch.autograd.grad(loss_of(model, 0, update, block), list(rates))
            with torch.no_grad():
                for p, g in zip(rates, gs, strict=True):
                    p.copy_(x[p])
                    total[p] += g
        with torch.no_grad():
            for p in rates:
                p.copy_(x[p] - rates[p] * total[p])
        past = {
            p: 0.7 * past[p] - 0.3 * rates[p] * total[p]
            if name == "average of updates"
            else total[p]
            for p in rates
        }
        found.append(flat(model))
    return found


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "name", ["local", "optimistic", "gradient-noise", "extragradient", "average of updates"]
)
def test_parameters_that_come_later_begin_afresh_and_others_keep_theirs(
    name: str, plan: str
) -> None:
    assert_same(train_changing(name, plan), train_changing_naively(name, plan))


@pytest.mark.parametrize("name", NAMES)
def test_everything_may_be_frozen_at_first(name: str) -> None:
    model = network()
    model.requires_grad_(False)
    optimizer = base_of(name)(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name])
    extrapolation.load_state_dict(extrapolation.state_dict())
    model.requires_grad_(True)
    found = []
    for update in range(3):

        def backward(update: int = update) -> None:
            torch.autograd.backward(loss_of(model, 0, update, 0))

        optimizer.zero_grad()
        with extrapolation.shifted(gradient=backward):
            backward()
        optimizer.step()
        found.append(flat(model))
    assert_same(found, train_naively(name, (1,) * 3, base=base_of(name)))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["noise", "sam"])
def test_every_direction_takes_up_parameters_that_come_later(name: str, plan: str) -> None:
    assert train_changing(name, plan)[-1].isfinite().all()


@pytest.mark.parametrize("change", [unfreeze, freeze, add])
def test_a_change_amid_an_update_of_several_workers_is_refused(change: Change) -> None:
    model = network()
    optimizer = first_optimizer(model, everything=change is not add)
    if change is unfreeze:
        freeze(model, optimizer)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=1.0), workers=2)
    with extrapolation.shifted(0):
        torch.autograd.backward(loss_of(model, 0, 1, 0))
    change(model, optimizer)
    before = flat(model)
    with (
        pytest.raises(RuntimeError, match=r"parameters were .* or call skip_update\(\)"),
        extrapolation.shifted(1),
    ):
        pass
    assert torch.equal(flat(model), before)
    optimizer.zero_grad()
    extrapolation.skip_update()
    for k in range(2):
        with extrapolation.shifted(k):
            torch.autograd.backward(loss_of(model, k, 1, 0))
    optimizer.step()


@pytest.mark.parametrize("name", ["local", "optimistic"])
@pytest.mark.parametrize("change", [unfreeze, freeze, add])
def test_a_change_after_an_update_that_was_left_out(change: Change, name: str) -> None:
    """With one worker it may be made at any time."""
    model = network()
    optimizer = first_optimizer(model, everything=change is not add)
    if change is unfreeze:
        freeze(model, optimizer)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name])
    past: dict[Tensor, Tensor] = {}
    for update in range(4):
        model.zero_grad()
        if update == 2:
            with extrapolation.shifted():
                torch.autograd.backward(loss_of(model, 0, 7, 0))
            change(model, optimizer)
            model.zero_grad()
        before = {p: p.detach().clone() for p in model.parameters()}
        with extrapolation.shifted():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    zeta = 0.5 * group["lr"] * past.get(p, 0 * p) if p.requires_grad else 0 * p
                    torch.testing.assert_close(p, before[p] - zeta, rtol=0, atol=1e-14)
            torch.autograd.backward(loss_of(model, 0, update, 0))
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        past = {p: p.grad for p in trained if p.requires_grad}
        optimizer.step()


# States by name.


def named(model: nn.Module, *, reordered: bool) -> torch.optim.Optimizer:
    everything = list(model.named_parameters())
    if not reordered:
        return torch.optim.SGD(everything, lr=0.1)
    groups: list[dict[str, Any]] = [
        {"params": [everything[3], everything[0]]},
        {"params": [everything[2], everything[1]]},
    ]
    return torch.optim.SGD(groups, lr=0.1)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["local", "optimistic", "gradient-noise", "average of updates"])
def test_a_state_goes_by_the_parameters_names(name: str, workers: int) -> None:
    def go(model: nn.Module, optimizer: Any, extrapolation: Extrapolation, updates: range) -> None:
        for update in updates:
            optimizer.zero_grad()
            for k in range(workers):
                with extrapolation.shifted(k):
                    torch.autograd.backward(loss_of(model, k, update, 0) / workers)
            optimizer.step()

    model = network()
    optimizer = named(model, reordered=False)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name], workers)
    go(model, optimizer, extrapolation, range(2))
    other = network()
    other.load_state_dict(model.state_dict())
    another = named(other, reordered=True)
    resumed = Extrapolation(another, DIRECTIONS[name], workers)
    resumed.load_state_dict(extrapolation.state_dict())
    go(model, optimizer, extrapolation, range(2, 4))
    go(other, another, resumed, range(2, 4))
    torch.testing.assert_close(flat(other), flat(model), rtol=0, atol=1e-13)


def test_a_state_of_names_leaves_out_what_was_frozen() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = named(model, reordered=True)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=1.0))
    with extrapolation.shifted():
        torch.autograd.backward(loss_of(model, 0, 0, 0))
    optimizer.step()
    state = extrapolation.state_dict()
    other = network()
    other[0].requires_grad_(False)
    resumed = Extrapolation(named(other, reordered=False), LocalGradient(ratio=1.0))
    resumed.load_state_dict(state)
    names = resumed.state_dict()["parameter_names"]
    rows = dict(zip(names, resumed.state_dict()["worker_state"]["gradient"], strict=True))
    assert rows.keys() == {"2.weight", "2.bias"}
    assert torch.equal(rows["2.weight"][0], model[2].weight.grad)
    assert torch.equal(rows["2.bias"][0], model[2].bias.grad)


@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("name", ["local", "optimistic", "average of updates"])
def test_a_loop_that_is_saved_while_its_parameters_are_frozen_is_saved_whole(
    name: str, names: bool
) -> None:
    """As the discriminator of a GAN is frozen while the generator is trained."""

    def loop() -> tuple[nn.Module, torch.optim.Optimizer, Extrapolation]:
        model = network()
        named = list(model.named_parameters())
        of: Any = named if names else [p for _, p in named]
        optimizer = torch.optim.SGD(of, lr=0.1, momentum=0.9, nesterov=True)
        return model, optimizer, Extrapolation(optimizer, DIRECTIONS[name])

    loops = [loop(), loop()]
    found = []
    for update in range(6):
        model, optimizer, extrapolation = loops[update // 3]
        model.requires_grad_(True)
        optimizer.zero_grad()
        with extrapolation.shifted():
            torch.autograd.backward(loss_of(model, 0, update, 0))
        model[0].requires_grad_(False)
        if update % 2:
            model[2].requires_grad_(False)
        optimizer.step()
        state = extrapolation.state_dict()
        if update == 2:
            resumed, another, its_extrapolation = loops[1]
            resumed.load_state_dict(model.state_dict())
            another.load_state_dict(optimizer.state_dict())
            its_extrapolation.load_state_dict(state)
        found.append(flat(model))
    assert_same(found, train_naively(name, (1,) * 6))


def saved_by(*, frozen: bool, names: bool) -> dict[str, Any]:
    model = network()
    model[0].requires_grad_(not frozen)
    parameters: Any = model.named_parameters() if names else model.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=1.0))
    with extrapolation.shifted():
        torch.autograd.backward(loss_of(model, 0, 0, 0))
    optimizer.step()
    return extrapolation.state_dict()


@pytest.mark.parametrize("names", [False, True])
def test_a_state_of_fewer_parameters_is_refused_in_a_sentence(names: bool) -> None:
    model = network()
    parameters: Any = model.named_parameters() if names else model.parameters()
    extrapolation = Extrapolation(torch.optim.SGD(parameters, lr=0.1), LocalGradient(ratio=1.0))
    message = r"no parameter '0\.weight'" if names else "2 parameters"
    with pytest.raises(ValueError, match=message):
        extrapolation.load_state_dict(saved_by(frozen=True, names=names))
    assert extrapolation.steps == 0


@pytest.mark.parametrize("names", [False, True])
def test_a_state_of_more_parameters_is_refused_or_loses_only_those(names: bool) -> None:
    """A head that was frozen since then: by name it is left out, by place it is refused."""
    model = network()
    model[0].requires_grad_(False)
    parameters: Any = model.named_parameters() if names else model.parameters()
    extrapolation = Extrapolation(torch.optim.SGD(parameters, lr=0.1), LocalGradient(ratio=1.0))
    state = saved_by(frozen=False, names=names)
    if not names:
        with pytest.raises(ValueError, match="4 parameters"):
            extrapolation.load_state_dict(state)
        return
    with contextlib.suppress(ValueError):
        extrapolation.load_state_dict(state)
        (rows,) = extrapolation.state_dict()["worker_state"].values()
        for row, saved in zip(rows, state["worker_state"]["gradient"][2:], strict=True):
            assert torch.equal(row, saved)


def test_a_state_loads_before_the_first_block_after_a_parameter_was_added() -> None:
    """The state of a loop to which a group was added, into a new loop that adds it too."""
    model = network()
    optimizer = first_optimizer(model, everything=False)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=1.0))
    add(model, optimizer)
    with extrapolation.shifted():
        torch.autograd.backward(loss_of(model, 0, 0, 0))
    optimizer.step()
    state = extrapolation.state_dict()
    other = network()
    another = first_optimizer(other, everything=False)
    resumed = Extrapolation(another, LocalGradient(ratio=1.0))
    add(other, another)
    resumed.load_state_dict(state)
    for a, b in zip(
        resumed.state_dict()["worker_state"]["gradient"],
        state["worker_state"]["gradient"],
        strict=True,
    ):
        assert a.any()
        assert torch.equal(a, b)


def test_a_state_saved_right_after_a_group_was_added_has_its_parameters() -> None:
    model = network()
    optimizer = first_optimizer(model, everything=False)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=1.0))
    with extrapolation.shifted():
        torch.autograd.backward(loss_of(model, 0, 0, 0))
    optimizer.step()
    add(model, optimizer)
    state = extrapolation.state_dict()
    other = network()
    another = first_optimizer(other, everything=False)
    add(other, another)
    resumed = Extrapolation(another, LocalGradient(ratio=1.0))
    resumed.load_state_dict(state)


# Weights that are computed, cached, or changed within a block.


def normalised() -> nn.Module:
    torch.manual_seed(3)
    layers = [parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("around", ["the block", "the loop", "nothing", "inside"])
@pytest.mark.parametrize("name", ["local", "optimistic", "extragradient", "noise"])
def test_cached_weights_are_those_of_the_shifted_parameters(name: str, around: str) -> None:
    model = normalised()
    optimizer = base_of(name)(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name])
    found, blocks = [], (1, 2, 2)

    def cached(where: str) -> Any:
        return parametrize.cached() if where == around else contextlib.nullcontext()

    with cached("the loop"):
        for update, count in enumerate(blocks):
            optimizer.zero_grad()
            for block in range(count):

                def backward(update: int = update, block: int = block) -> None:
                    torch.autograd.backward(loss_of(model, 0, update, block), retain_graph=True)

                with cached("the block"):
                    if around == "the block":
                        with torch.no_grad():
                            before = model(torch.ones(1, 3, dtype=torch.float64))
                    with extrapolation.shifted(gradient=backward), cached("inside"):
                        backward()
                    if around == "the block":
                        # The weights are x again, and the net knows.
                        with torch.no_grad():
                            after = model(torch.ones(1, 3, dtype=torch.float64))
                        assert torch.equal(before, after)
            optimizer.step()
            found.append(flat(model))
    assert_same(found, train_naively(name, blocks, model=normalised))


def change_by_hand(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.mul_(0.5)


def load(model: nn.Module) -> None:
    model.load_state_dict({name: t + 1.0 for name, t in model.state_dict().items()})


def one_row(model: nn.Module) -> None:
    with torch.no_grad():
        model[2].bias[0] = 3.0


@pytest.mark.parametrize("when", ["before backward", "after backward"])
@pytest.mark.parametrize("change", [change_by_hand, load, one_row])
@pytest.mark.parametrize("workers", [1, 2])
def test_weights_changed_in_a_block_are_refused(
    change: Callable[[nn.Module], None], when: str, workers: int
) -> None:
    model = network()
    optimizer = base_of("local")(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS["local"], workers)
    before = flat(model)
    steps = [lambda: torch.autograd.backward(loss_of(model, 0, 0, 0)), lambda: change(model)]

    def block() -> None:
        with extrapolation.shifted(0):
            for step in steps if when == "after backward" else reversed(steps):
                step()

    with pytest.raises(RuntimeError, match="weights"):
        block()
    assert torch.equal(flat(model), before)
    # The loop can go on.
    optimizer.zero_grad()
    for k in range(workers):
        with extrapolation.shifted(k):
            torch.autograd.backward(loss_of(model, k, 0, 0))
    optimizer.step()
    assert extrapolation.steps == 1


def test_an_embedding_that_rescales_its_rows_is_refused_in_a_block() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=1.0))
    with pytest.raises(RuntimeError, match="max_norm"), extrapolation.shifted():
        torch.autograd.backward(model(torch.tensor([0, 3])).sum())


@pytest.mark.parametrize("workers", [1, 2])
def test_sparse_gradients_are_refused(workers: int) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=1.0), workers)
    before = flat(model)

    def update() -> None:
        for k in range(workers):
            with extrapolation.shifted(k):
                torch.autograd.backward(model(torch.tensor([0, 3])).sum())
        optimizer.step()

    with pytest.raises(RuntimeError, match="sparse"):
        update()
    assert torch.equal(flat(model), before)


def test_noise_needs_no_gradient_and_takes_sparse_ones() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    extrapolation = Extrapolation(optimizer, GaussianNoise(size=0.1))
    before = flat(model)
    with extrapolation.shifted():
        torch.autograd.backward(model(torch.tensor([0, 3])).sum())
    assert torch.equal(flat(model), before)
    optimizer.step()
    assert not torch.equal(flat(model), before)
