"""Optimizers that call a closure within their step."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from naive_loop import (
    DIRECTIONS,
    FORMULAS,
    At,
    Trajectory,
    adam,
    assert_same,
    base_of,
    flat,
    loss_of,
    network,
    train_naively,
)
from torch import Tensor, nn

from egtrain.optim import Extrapolation

UPDATES = 4
ONE_GRADIENT = ["local", "optimistic", "noise", "average of updates"]
Base = Callable[[nn.Module], torch.optim.Optimizer]


def lbfgs(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, **options)


def lbfgs_with_line_search(model: nn.Module) -> torch.optim.Optimizer:
    return lbfgs(model, line_search_fn="strong_wolfe")


def closure_for(
    model: nn.Module, optimizer: torch.optim.Optimizer, update: int, calls: list[Tensor]
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        calls.append(flat(model))
        loss = loss_of(model, 0, update, 0)
        torch.autograd.backward(loss)
        return loss

    return closure


def train_naively_with_closures(
    name: str, base: Base
) -> tuple[Trajectory, list[list[Tensor]], list[list[Tensor]]]:
    """Return the weights after each update, and of each the weights where the closure was called
    and where it took the gradient.
    """
    model = network()
    optimizer = base(model)
    parameters = list(model.parameters())
    (group,) = optimizer.param_groups
    zero = [torch.zeros_like(p) for p in parameters]
    past, average = zero, zero
    found, called, seen = [], [], []

    def write(weights: list[Tensor]) -> None:
        with torch.no_grad():
            for p, w in zip(parameters, weights, strict=True):
                p.copy_(w)

    for update in range(UPDATES):
        start = [p.detach().clone() for p in parameters]
        called.append([])
        seen.append([])
        last: list[Tensor] = []

        def closure(
            update: int = update,
            last: list[Tensor] = last,
            past: list[Tensor] = past,
            average: list[Tensor] = average,
        ) -> Tensor:
            x = [p.detach().clone() for p in parameters]
            called[-1].append(flat(model))

            def gradient() -> list[Tensor]:
                return list(torch.autograd.grad(loss_of(model, 0, update, 0), parameters))

            zeta = FORMULAS[name](
                At(
                    worker=0,
                    step=update,
                    x=x,
                    rates=[group["lr"]] * len(parameters),
                    own=past,
                    mean=past,
                    momentum=zero,
                    average_update=average,
                    second=gradient,
                )
            )
            write([w - z for w, z in zip(x, zeta, strict=True)])
            seen[-1].append(flat(model))
            optimizer.zero_grad()
            loss = loss_of(model, 0, update, 0)
            torch.autograd.backward(loss)
            last[:] = [p.grad.clone() for p in parameters]
            write(x)
            return loss

        optimizer.step(closure)
        past = last
        average = [
            0.7 * m + 0.3 * (p.detach() - w)
            for m, p, w in zip(average, parameters, start, strict=True)
        ]
        found.append(flat(model))
    return found, called, seen


def train(name: str, base: Base, *, inside: bool) -> tuple[Trajectory, list[list[Tensor]]]:
    """Train by `extrapolation.step(closure)`, or with the block in the closure."""
    model = network()
    optimizer = base(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name])
    found, seen = [], []
    for update in range(UPDATES):
        calls: list[Tensor] = []
        closure = closure_for(model, optimizer, update, calls)

        def in_a_block(closure: Callable[[], Tensor] = closure) -> Tensor:
            with extrapolation.shifted(gradient=closure):
                return closure()

        if inside:
            optimizer.step(in_a_block)
        else:
            result = extrapolation.step(closure)
            assert isinstance(result, Tensor)
        found.append(flat(model))
        seen.append(calls)
    assert extrapolation.steps == UPDATES
    return found, seen


def test_the_naive_lbfgs_calls_its_closure_several_times_and_shifts() -> None:
    for base in (lbfgs, lbfgs_with_line_search):
        for name in ONE_GRADIENT:
            found, called, seen = train_naively_with_closures(name, base)
            assert min(map(len, called)) > 1
            assert (found[-1] - train_naively_with_closures("none", base)[0][-1]).norm() > 1e-4
            for of_one, shifted in zip(called, seen, strict=True):
                zetas = [a - b for a, b in zip(of_one, shifted, strict=True)]
                for zeta in zetas:
                    torch.testing.assert_close(zeta, zetas[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("inside", [False, True], ids=["step(closure)", "block in the closure"])
@pytest.mark.parametrize("base", [lbfgs, lbfgs_with_line_search])
@pytest.mark.parametrize("name", ONE_GRADIENT)
def test_lbfgs_has_the_same_shift_in_every_call_of_a_step(
    name: str, base: Base, inside: bool
) -> None:
    expected, _, where = train_naively_with_closures(name, base)
    found, seen = train(name, base, inside=inside)
    assert [len(calls) for calls in seen] == [len(calls) for calls in where]
    for calls, others in zip(seen, where, strict=True):
        assert_same(calls, others, tolerance=1e-9)
    assert_same(found, expected, tolerance=1e-9)


@pytest.mark.parametrize("base", [lbfgs, lbfgs_with_line_search])
@pytest.mark.parametrize("name", ["extragradient", "sam"])
def test_lbfgs_with_a_second_gradient_at_each_call(name: str, base: Base) -> None:
    expected, _, where = train_naively_with_closures(name, base)
    found, seen = train(name, base, inside=False)
    # The closure is called at x and then at x − ζ.
    for calls, others in zip(seen, where, strict=True):
        assert_same(calls[1::2], others, tolerance=1e-9)
    assert_same(found, expected, tolerance=1e-9)


@pytest.mark.parametrize("inside", [False, True], ids=["step(closure)", "block in the closure"])
@pytest.mark.parametrize("base", [None, adam], ids=["SGD", "Adam"])
@pytest.mark.parametrize("name", [*ONE_GRADIENT, "gradient-noise", "sam", "extragradient", "msam"])
def test_a_closure_of_an_optimizer_that_calls_it_once(
    name: str, base: Base | None, inside: bool
) -> None:
    if name == "msam":  # the naive loop has no momentum of Adam
        base = None
    base = base or base_of(name)
    found, _ = train(name, base, inside=inside)
    assert_same(found, train_naively(name, [1] * UPDATES, base=base))


def test_step_and_a_block_with_step_may_alternate() -> None:
    model = network()
    optimizer = base_of("local")(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS["local"])
    found = []
    for update in range(UPDATES):
        closure = closure_for(model, optimizer, update, [])
        if update % 2:
            extrapolation.step(closure)
        else:
            with extrapolation.shifted():
                closure()
            optimizer.step()
        found.append(flat(model))
    assert_same(found, train_naively("local", [1] * UPDATES))


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("base", [None, adam, lbfgs], ids=["SGD", "Adam", "L-BFGS"])
@pytest.mark.parametrize("name", [*ONE_GRADIENT, "gradient-noise", "sam", "extragradient"])
def test_a_closure_after_a_finished_block_is_refused(
    name: str, base: Base | None, how: str
) -> None:
    model = network()
    optimizer = (base or base_of(name))(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name])
    for update in range(2):
        closure = closure_for(model, optimizer, update, [])
        before = flat(model)
        with extrapolation.shifted(gradient=closure):
            closure()
        arguments = {"closure": closure} if how == "keyword" else {}
        step = functools.partial(optimizer.step, *([] if arguments else [closure]), **arguments)
        with pytest.raises(RuntimeError, match=r"extrapolation\.step\(closure\)"):
            step()
        assert torch.equal(flat(model), before)
        extrapolation.step(closure)  # the way out that the message names
        assert not torch.equal(flat(model), before)
    assert extrapolation.steps == 2


@pytest.mark.parametrize("name", [*ONE_GRADIENT, "gradient-noise", "sam", "extragradient"])
def test_blocks_before_that_of_the_closure_are_of_the_same_update(name: str) -> None:
    """The last mini-batch of an update in the closure, as some trainers have it."""
    model = network()
    optimizer = base_of(name)(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name])
    found, blocks = [], (2, 1, 3, 2)
    for update, count in enumerate(blocks):
        optimizer.zero_grad()

        def block(number: int, update: int = update) -> None:
            def backward() -> None:
                torch.autograd.backward(loss_of(model, 0, update, number))

            with extrapolation.shifted(gradient=backward):
                backward()

        for number in range(count - 1):
            block(number)
        optimizer.step(functools.partial(block, count - 1))  # type: ignore[arg-type]
        found.append(flat(model))
    assert_same(found, train_naively(name, blocks))


def test_a_closure_that_only_returns_the_loss_may_come_after_the_block() -> None:
    model = network()
    optimizer = base_of("local")(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS["local"])
    found = []
    for update in range(UPDATES):
        with extrapolation.shifted():
            loss = closure_for(model, optimizer, update, [])()
        optimizer.step(loss.item)
        found.append(flat(model))
    assert_same(found, train_naively("local", [1] * UPDATES))


def test_what_was_refused_leaves_no_trace() -> None:
    model = network()
    optimizer = base_of("local")(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS["local"])
    found = []
    for update in range(UPDATES):
        closure = closure_for(model, optimizer, update, [])
        with extrapolation.shifted():
            closure()
        with contextlib.suppress(RuntimeError):
            optimizer.step(closure)
        optimizer.zero_grad()
        with extrapolation.shifted():
            closure()
        optimizer.step()
        found.append(flat(model))
    assert_same(found, train_naively("local", [1] * UPDATES))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("base", "call"), [(None, 1), (lbfgs, 1), (lbfgs, 2)], ids=["SGD", "L-BFGS", "L-BFGS, later"]
)
@pytest.mark.parametrize("name", ["local", "optimistic"])
def test_a_closure_that_fails_leaves_the_weights_unshifted(
    name: str, base: Base | None, call: int, error: type[BaseException]
) -> None:
    model = network()
    optimizer = (base or base_of(name))(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name])
    extrapolation.step(closure_for(model, optimizer, 0, []))
    steps, calls = extrapolation.steps, 0
    state = extrapolation.state_dict()
    before = flat(model)

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        loss = closure_for(model, optimizer, 1, [])()
        if calls == call:
            raise error
        return loss

    with pytest.raises(error):
        extrapolation.step(failing)
    if call == 1:
        assert torch.equal(flat(model), before)
    # Nothing of the step that was not finished is remembered, and the loop can go on.
    for part in ("worker_state", "shared_state"):
        for key, tensors in extrapolation.state_dict()[part].items():
            for a, b in zip(tensors, state[part][key], strict=True):
                assert torch.equal(a, b)
    optimizer.zero_grad()
    if base is None:
        found = []
        for update in (1, 2):
            optimizer.zero_grad()
            with extrapolation.shifted():
                torch.autograd.backward(loss_of(model, 0, update, 0))
            optimizer.step()
            found.append(flat(model))
        assert extrapolation.steps == steps + 2
        assert_same(found, train_naively(name, [1, 1, 1])[1:])
    else:
        extrapolation.step(closure_for(model, optimizer, 1, []))


def test_a_scheduler_counts_the_steps_of_closures() -> None:
    """It wraps the optimizer's step, and warns if it has not seen one."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    extrapolation = Extrapolation(optimizer, DIRECTIONS["local"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for update in range(2):
        extrapolation.step(closure_for(model, optimizer, update, []))
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_a_closure_may_return_a_number_or_nothing() -> None:
    for value in (1.5, None):
        model = network()
        optimizer = base_of("local")(model)
        extrapolation = Extrapolation(optimizer, DIRECTIONS["local"])

        def closure(value: float | None = value, model: nn.Module = model) -> float | None:
            torch.autograd.backward(loss_of(model, 0, 0, 0))
            return value

        assert extrapolation.step(closure) == value


def test_a_step_without_a_block_may_have_a_closure() -> None:
    model, other = network(), network()
    optimizer, plain = base_of("local")(model), base_of("local")(other)
    extrapolation = Extrapolation(optimizer, DIRECTIONS["optimistic"])
    for update in range(2):
        with contextlib.suppress(RuntimeError):  # refused, or a plain step
            optimizer.step(closure_for(model, optimizer, update, []))
            plain.step(closure_for(other, plain, update, []))
            assert torch.equal(flat(model), flat(other))
    assert extrapolation.steps in (0, 2)


def test_lbfgs_of_several_workers_takes_their_blocks_in_the_closure() -> None:
    """The closure of two workers that see the same samples makes the steps of one worker."""
    model = network()
    optimizer = lbfgs(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS["optimistic"], workers=2)
    found = []
    for update in range(UPDATES):

        def closure(update: int = update) -> Tensor:
            optimizer.zero_grad()
            for k in range(2):
                with extrapolation.shifted(k):
                    loss = loss_of(model, 0, update, 0)
                    torch.autograd.backward(loss / 2)
            return loss

        optimizer.step(closure)
        found.append(flat(model))
    assert_same(found, train_naively_with_closures("optimistic", lbfgs)[0], tolerance=1e-9)
