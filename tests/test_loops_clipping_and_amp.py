"""Clipped and scaled gradients: what is remembered is clipped and unscaled with them."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from naive_loop import (
    DIRECTIONS,
    Trajectory,
    Vectors,
    adam,
    assert_same,
    base_of,
    flat,
    heavy_ball,
    loss_of,
    network,
    norm_clipped,
    train_naively,
)
from torch import Tensor, nn

from egtrain.optim import Extrapolation, LocalGradient

BLOCKS = (2, 1, 3, 2, 1)
LIMIT = 1.5
"""It clips some of the updates and not the others."""
OF_PAST = ["local", "optimistic", "gradient-noise", "average of updates"]


def clip_norm(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), LIMIT)


def clip_norm_one_by_one(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), LIMIT, foreach=False)


def clip_by_hand(model: nn.Module) -> None:
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    for p in model.parameters():
        p.grad = p.grad * torch.clamp(LIMIT / (norm + 1e-6), max=1.0)


def clip_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.3)


def clip_layers(model: nn.Module) -> None:
    for layer in (model[0], model[2]):
        nn.utils.clip_grad_norm_(layer.parameters(), 0.8)


def by_layer(gradients: Vectors) -> Vectors:
    clip = norm_clipped(0.8)
    return [*clip(gradients[:2]), *clip(gradients[2:])]


FORMULAS: dict[str, tuple[Callable[[nn.Module], None], Callable[[Vectors], Vectors]]] = {
    "norm": (clip_norm, norm_clipped(LIMIT)),
    "norm, one by one": (clip_norm_one_by_one, norm_clipped(LIMIT)),
    "norm, into new tensors": (clip_by_hand, norm_clipped(LIMIT)),
    "value": (clip_value, lambda gradients: [g.clamp(-0.3, 0.3) for g in gradients]),
    "norm of each layer": (clip_layers, by_layer),
}


def train(
    name: str,
    clip: Callable[[nn.Module], None] | None,
    *,
    workers: int = 1,
    form: str = "added",
    inside: bool = False,
    base: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
) -> Trajectory:
    """Train the small net; workers' gradients are added, or the loop sets their mean."""
    model = network()
    optimizer = (base or base_of(name))(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name], workers)
    found = []
    for update, count in enumerate(BLOCKS):
        optimizer.zero_grad()
        gradients = []
        for k in range(workers):
            if form == "mean":
                optimizer.zero_grad()
            for block in range(count):
                part = 1 / workers if form == "added" else 1.0

                def again(k: int = k, block: int = block, part: float = part) -> None:
                    torch.autograd.backward(part * loss_of(model, k, update, block))  # noqa: B023

                with extrapolation.shifted(k, gradient=again):
                    again()
                    if clip is not None and inside and (k, block) == (workers - 1, count - 1):
                        clip(model)
            gradients.append([p.grad for p in model.parameters()])
        if form == "mean":
            for p, *own in zip(model.parameters(), *gradients, strict=True):
                p.grad = torch.stack(own).mean(dim=0)
        if clip is not None and not inside:
            clip(model)
        optimizer.step()
        found.append(flat(model))
    return found


def test_the_limits_clip_some_of_the_updates_and_not_the_others() -> None:
    factors = []

    def noted(gradients: Vectors) -> Vectors:
        clipped = norm_clipped(LIMIT)(gradients)
        factors.append((clipped[0] / gradients[0]).max().item())
        return clipped

    train_naively("local", BLOCKS, clip=noted)
    assert min(factors) < 0.8
    assert max(factors) == 1


@pytest.mark.parametrize("inside", [False, True], ids=["after the block", "inside the block"])
@pytest.mark.parametrize("how", FORMULAS)
@pytest.mark.parametrize("name", OF_PAST)
def test_one_worker_remembers_the_clipped_gradient(name: str, how: str, inside: bool) -> None:
    clip, formula = FORMULAS[how]
    found = train(name, clip, inside=inside)
    assert_same(found, train_naively(name, BLOCKS, clip=formula))


@pytest.mark.parametrize(
    "how", [how for how in FORMULAS if how.startswith("norm,") or how == "norm"]
)
@pytest.mark.parametrize("name", ["local", "gradient-noise", "optimistic"])
def test_workers_past_gradients_are_scaled_by_the_factor_of_the_mean(name: str, how: str) -> None:
    clip, formula = FORMULAS[how]
    found = train(name, clip, workers=3, form="mean")
    assert_same(found, train_naively(name, BLOCKS, workers=3, clip=formula))


@pytest.mark.parametrize("name", ["local", "optimistic"])
def test_workers_that_add_into_one_gradient_are_clipped_together(name: str) -> None:
    found = train(name, clip_norm, workers=3)
    assert_same(
        found, train_naively(name, BLOCKS, workers=3, clip=norm_clipped(LIMIT), share=1 / 3)
    )


def test_several_workers_clipped_by_value_are_scaled_by_the_norms() -> None:
    found = train("local", clip_value, workers=2, form="mean")
    formula = FORMULAS["value"][1]
    assert_same(found, train_naively("local", BLOCKS, workers=2, clip=formula))


@pytest.mark.parametrize("form", ["added", "mean"])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", OF_PAST)
def test_a_limit_that_is_not_reached_changes_no_bit(name: str, workers: int, form: str) -> None:
    def large(model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)

    found = train(name, large, workers=workers, form=form)[-1]
    assert torch.equal(found, train(name, None, workers=workers, form=form)[-1])


@pytest.mark.parametrize("form", ["added", "mean"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_without_clipping_workers_remember_what_they_added(workers: int, form: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    extrapolation = Extrapolation(optimizer, LocalGradient(rate=1.0), workers)
    own, means = [], []
    for k in range(workers):
        if form == "mean":
            optimizer.zero_grad()
        own.append(torch.autograd.grad(loss_of(model, k, 0, 0), list(model.parameters())))
        with extrapolation.shifted(k):
            torch.autograd.backward(loss_of(model, k, 0, 0))
        means.append([p.grad for p in model.parameters()])
    if form == "mean":
        for p, *gradients in zip(model.parameters(), *means, strict=True):
            p.grad = torch.stack(gradients).mean(dim=0)
    optimizer.step()
    before = flat(model)
    for k in range(workers):
        with extrapolation.shifted(k):
            seen = flat(model)
            torch.autograd.backward(loss_of(model, k, 1, 0))
        past = torch.cat([g.flatten() for g in own[k]])
        if form == "mean" and workers > 1:
            # The norm of a mean is not that of the sum over the number, to the last bit.
            torch.testing.assert_close(seen, before - past, rtol=1e-15, atol=1e-15)
        else:
            assert torch.equal(seen, before - past)


@pytest.mark.parametrize("when", ["before", "after", "after the first update"])
def test_clipping_by_a_hook_of_the_optimizer(when: str) -> None:
    model = network()
    optimizer = base_of("local")(model)

    def clip(*_: object) -> None:
        clip_norm(model)

    if when == "before":
        optimizer.register_step_pre_hook(clip)
    extrapolation = Extrapolation(optimizer, DIRECTIONS["local"])
    if when == "after":
        optimizer.register_step_pre_hook(clip)
    found = []
    for update, count in enumerate(BLOCKS):
        if when == "after the first update" and update == 1:
            optimizer.register_step_pre_hook(clip)
        optimizer.zero_grad()
        for block in range(count):
            with extrapolation.shifted():
                torch.autograd.backward(loss_of(model, 0, update, block))
        if when == "after the first update" and update == 0:
            clip(model)
        optimizer.step()
        found.append(flat(model))
    assert_same(found, train_naively("local", BLOCKS, clip=norm_clipped(LIMIT)))


def test_the_factor_is_that_of_one_update() -> None:
    """X = 1, two workers, clipped in the first update alone."""
    x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=0.0)
    extrapolation = Extrapolation(optimizer, LocalGradient(rate=0.1), workers=2)
    seen = []
    for update in range(3):
        optimizer.zero_grad()
        for worker, slope in enumerate((1.0, 3.0)):
            with extrapolation.shifted(worker):
                seen.append(x.item())
                torch.autograd.backward(slope * x)
        if update == 0:
            x.grad.mul_(0.25)
        optimizer.step()
    assert seen == pytest.approx([1, 1, 1 - 0.025, 1 - 0.075, 0.9, 0.7], abs=1e-15)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_gradient_clipped_to_zero_is_no_nan(workers: int) -> None:
    x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=0.1)
    extrapolation = Extrapolation(optimizer, LocalGradient(rate=0.1), workers)
    for _ in range(2):
        optimizer.zero_grad()
        for worker in range(workers):
            with extrapolation.shifted(worker):
                assert x.item() == 1
                torch.autograd.backward(x * 2.0)
        x.grad.zero_()
        optimizer.step()
    optimizer.zero_grad()
    for worker in range(workers):  # a gradient that is zero by itself
        with extrapolation.shifted(worker):
            torch.autograd.backward(x * 0.0)
    optimizer.step()
    with extrapolation.shifted(0):
        assert x.item() == 1
        torch.autograd.backward(x * 2.0)


# torch.amp.GradScaler: everything is a power of two, so scaling does not round.


def fused_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)


def fused_heavy_ball(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)


def fused_adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.05, fused=True)


def scaled_batches() -> Iterator[tuple[int, int, bool]]:
    """Yield the number, the blocks and whether it overflows, of each update."""
    for update, count in enumerate(BLOCKS):
        yield update, count, update == 2


def train_scaled(
    name: str,
    base: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    unscaled: str = "by itself",
    workers: int = 1,
    clip: bool = False,
    initial: float = 2.0**10,
    overflow: float = math.inf,
) -> tuple[Trajectory, Extrapolation]:
    """Train with a GradScaler whose third update overflows in its last block."""
    model = network()
    optimizer = base(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name], workers)
    scaler = torch.amp.GradScaler("cpu", init_scale=initial, growth_interval=2)
    found = []
    for update, count, overflows in scaled_batches():
        optimizer.zero_grad()
        for block in range(count):
            for k in range(workers):
                last = (block, k) == (count - 1, workers - 1)

                def again(k: int = k, block: int = block, factor: float = 1.0) -> None:
                    loss = loss_of(model, k, update, block) / workers  # noqa: B023
                    torch.autograd.backward(scaler.scale(factor * loss))

                with extrapolation.shifted(k, gradient=again):
                    again(factor=overflow if overflows and last else 1.0)
                    if last and unscaled == "inside":
                        scaler.unscale_(optimizer)
        if unscaled == "after":
            scaler.unscale_(optimizer)
        if clip:
            clip_norm(model)
        scaler.step(optimizer)
        scaler.update()
        found.append(flat(model))
    assert all(weights.isfinite().all() for weights in found)
    return found, extrapolation


@pytest.mark.parametrize("unscaled", ["inside", "after", "by itself"])
@pytest.mark.parametrize("name", ["local", "optimistic", "gradient-noise", "noise"])
def test_a_scaler_makes_the_steps_of_the_unscaled_loop_less_the_overflow(
    name: str, unscaled: str
) -> None:
    found, extrapolation = train_scaled(name, base_of(name), unscaled=unscaled)
    assert_same(found, train_naively(name, BLOCKS, skipped=(2,)))
    assert torch.equal(found[2], found[1])
    assert extrapolation.steps == len(BLOCKS) - 1


@pytest.mark.parametrize("name", ["msam", "average of updates"])
def test_a_scaler_serves_directions_along_what_the_optimizer_did(name: str) -> None:
    found, _ = train_scaled(name, base_of(name))
    assert_same(found, train_naively(name, BLOCKS, skipped=(2,), base=base_of(name)))


@pytest.mark.parametrize("unscaled", ["inside", "after", "by itself"])
@pytest.mark.parametrize("overflow", [math.inf, math.nan])
@pytest.mark.parametrize("base", [(fused_sgd, None), (fused_adam, adam)], ids=["SGD", "Adam"])
@pytest.mark.parametrize("name", ["local", "optimistic", "gradient-noise"])
def test_a_fused_optimizer_to_which_the_scaler_leaves_the_overflow(
    name: str, base: Any, overflow: float, unscaled: str
) -> None:
    fused, plain = base
    found, _ = train_scaled(name, fused, unscaled=unscaled, overflow=overflow)
    expected = train_naively(name, BLOCKS, skipped=(2,), base=plain or base_of(name))
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("name", "base"), [("msam", fused_heavy_ball), ("average of updates", fused_sgd)]
)
def test_a_fused_optimizer_and_directions_along_what_it_did(name: str, base: Any) -> None:
    found, _ = train_scaled(name, base)
    assert_same(found, train_naively(name, BLOCKS, skipped=(2,), base=base_of(name)))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", ["inside", "after"])
@pytest.mark.parametrize("name", ["local", "optimistic"])
def test_a_clipped_scaled_loop_is_the_clipped_one(name: str, unscaled: str, fused: bool) -> None:
    base = fused_sgd if fused else base_of(name)
    found, _ = train_scaled(name, base, unscaled=unscaled, clip=True)
    assert_same(found, train_naively(name, BLOCKS, skipped=(2,), clip=norm_clipped(LIMIT)))


@pytest.mark.parametrize("initial", [2.0**10, 0.25], ids=["scaled up", "scaled down"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_workers_that_add_into_one_scaled_gradient(clip: bool, fused: bool, initial: float) -> None:
    """Where nothing overflows; a loop of several workers says that it leaves an update out."""
    base = fused_sgd if fused else base_of("local")
    found, _ = train_scaled(
        "local",
        base,
        workers=2,
        unscaled="after" if clip else "by itself",
        clip=clip,
        initial=initial,
        overflow=1.0,
    )
    formula: Any = norm_clipped(LIMIT) if clip else lambda gradients: gradients
    assert_same(found, train_naively("local", BLOCKS, workers=2, share=1 / 2, clip=formula))


def test_workers_whose_fused_optimizer_leaves_an_overflow_out() -> None:
    found, _ = train_scaled("local", fused_sgd, workers=2)
    assert_same(found, train_naively("local", BLOCKS, workers=2, share=1 / 2, skipped=(2,)))


def test_workers_whose_scaler_leaves_an_overflow_out_are_told_to_say_so() -> None:
    with pytest.raises(RuntimeError, match=r"skip_update\(\)"):
        train_scaled("local", base_of("local"), workers=2)


def test_a_scaler_that_is_off_changes_nothing() -> None:
    model = network()
    optimizer = base_of("local")(model)
    extrapolation = Extrapolation(optimizer, DIRECTIONS["local"])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    found = []
    for update, count in enumerate(BLOCKS):
        optimizer.zero_grad()
        for block in range(count):
            with extrapolation.shifted():
                torch.autograd.backward(scaler.scale(loss_of(model, 0, update, block)))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        found.append(flat(model))
    assert_same(found, train_naively("local", BLOCKS))


def test_an_overflow_in_the_first_update_leaves_no_shift() -> None:
    def fused_without_momentum(model: nn.Module) -> torch.optim.Optimizer:
        # Of a first update that is left out, torch's fused SGD keeps a momentum without a value.
        return torch.optim.SGD(model.parameters(), lr=0.1, fused=True)

    for base in (heavy_ball, fused_without_momentum):
        model = network()
        optimizer = base(model)
        extrapolation = Extrapolation(optimizer, LocalGradient(ratio=1.0))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        before = flat(model)
        for factor in (math.inf, 1.0):
            optimizer.zero_grad()
            with extrapolation.shifted():
                assert torch.equal(flat(model), before)
                torch.autograd.backward(scaler.scale(factor * loss_of(model, 0, 0, 0)))
            scaler.step(optimizer)
            scaler.update()
        assert flat(model).isfinite().all()
        assert not torch.equal(flat(model), before)


def test_half_precision_weights_survive_the_scalers_search_for_its_scale() -> None:
    """The default scale is 65,536; the losses here overflow fp16 until it has halved."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=0.5))
    scaler = torch.amp.GradScaler("cpu")
    inputs = torch.randn(64, 4) * 5
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with extrapolation.shifted(), torch.autocast("cpu", torch.float16):
            loss = model(inputs).float().square().mean()
            losses.append(loss.item())
            torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
    assert math.isfinite(losses[-1])
    assert losses[-1] < losses[0] / 10
    assert all(g.isfinite().all() for g in past(extrapolation))


def past(extrapolation: Extrapolation) -> list[Tensor]:
    tensors: list[Tensor] = extrapolation.state_dict()["worker_state"]["gradient"]
    return tensors


def test_what_is_remembered_of_a_scaled_loop_is_unscaled() -> None:
    for base in (base_of("local"), fused_sgd):
        model = network()
        optimizer = base(model)
        extrapolation = Extrapolation(optimizer, LocalGradient(ratio=1.0))
        own = torch.autograd.grad(loss_of(model, 0, 0, 0), list(model.parameters()))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with extrapolation.shifted():
            torch.autograd.backward(scaler.scale(loss_of(model, 0, 0, 0)))
        scaler.step(optimizer)
        for remembered, g in zip(past(extrapolation), own, strict=True):
            torch.testing.assert_close(remembered[0], g, rtol=1e-14, atol=0)
