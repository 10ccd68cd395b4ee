"""Several blocks before one step are one update, in the loops that people write."""

import contextlib
import copy
import functools
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from naive_loop import (
    DIRECTIONS,
    Trajectory,
    assert_same,
    base_of,
    flat,
    loss_of,
    network,
    train_naively,
)
from torch import Tensor, nn

from egtrain.optim import (
    MSAM,
    Direction,
    Extrapolation,
    GaussianNoise,
    GradientNoise,
    LocalGradient,
    OptimisticGradient,
    SmoothOut,
    State,
)

BLOCKS = (1, 3, 2, 1, 2)
"""The number of blocks of each update."""
NAMES = list(DIRECTIONS)
SEVERAL = [name for name in NAMES if name not in ("msam", "average of updates")]
"""Those in which workers differ."""

Loop = tuple[nn.Module, torch.optim.Optimizer, Extrapolation]


def a_loop(name: str, workers: int | None = None) -> Loop:
    model = network()
    optimizer = base_of(name)(model)
    return model, optimizer, Extrapolation(optimizer, DIRECTIONS[name], workers)


def backward(model: nn.Module, worker: int, update: int, block: int, part: float = 1.0) -> None:
    torch.autograd.backward(part * loss_of(model, worker, update, block))


def one_update(loop: Loop, update: int, count: int) -> None:
    """Make one update of so many blocks, with one worker."""
    model, optimizer, extrapolation = loop
    optimizer.zero_grad()
    for block in range(count):
        again = functools.partial(backward, model, 0, update, block)
        with extrapolation.shifted(gradient=again):
            again()
    optimizer.step()


def train(loop: Loop, blocks: Sequence[int] = BLOCKS, start: int = 0) -> Trajectory:
    found = []
    for update, count in enumerate(blocks[start:], start):
        one_update(loop, update, count)
        found.append(flat(loop[0]))
    return found


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        # g = 2·y, y = x − 0.1·(g before): y = 1, 0.6, 0.56
        (LocalGradient(ratio=1.0), [0.8, 0.68, 0.568]),
        (OptimisticGradient(ratio=1.0), [0.8, 0.68, 0.568]),
        (GradientNoise(ratio=1.0), [0.8, 0.64, 0.512]),
    ],
    ids=["local", "optimistic", "gradient-noise"],
)
def test_two_blocks_and_one_around_both_are_the_same_by_hand(
    direction: Direction, expected: list[float]
) -> None:
    for separate in (True, False):
        x = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        optimizer = torch.optim.SGD([x], lr=0.1)
        extrapolation = Extrapolation(optimizer, direction)
        found = []
        for _ in range(3):
            optimizer.zero_grad()
            if separate:
                for a in (1, 3):
                    with extrapolation.shifted():
                        torch.autograd.backward(a * x * x / 4)
            else:
                with extrapolation.shifted():
                    for a in (1, 3):
                        torch.autograd.backward(a * x * x / 4)
            optimizer.step()
            found.append(x.item())
        assert found == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_the_naive_loop_shifts_so_far_that_a_fault_would_be_seen(name: str) -> None:
    workers = 2 if name == "gradient-noise" else 1
    found = train_naively(name, BLOCKS, workers=workers, base=base_of(name))[-1]
    none = train_naively("none", BLOCKS, workers=workers, base=base_of(name))[-1]
    assert (found - none).abs().max() > 1e-3


@pytest.mark.parametrize("none", [True, False], ids=["to None", "to zero"])
@pytest.mark.parametrize("zeroed", ["before", "inside", "after"])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_before_one_step_are_one_update(name: str, zeroed: str, none: bool) -> None:
    model, optimizer, extrapolation = a_loop(name)
    found = []
    for update, count in enumerate(BLOCKS):
        if zeroed == "before":
            optimizer.zero_grad(set_to_none=none)
        for block in range(count):
            again = functools.partial(backward, model, 0, update, block)
            with extrapolation.shifted(gradient=again):
                if zeroed == "inside" and block == 0:
                    optimizer.zero_grad(set_to_none=none)
                again()
        optimizer.step()
        if zeroed == "after":
            optimizer.zero_grad(set_to_none=none)
        found.append(flat(model))
    assert extrapolation.steps == len(BLOCKS)
    assert_same(found, train_naively(name, BLOCKS, base=base_of(name)))


@pytest.mark.parametrize("none", [True, False], ids=["to None", "to zero"])
@pytest.mark.parametrize("zeroing", [True, False])
@pytest.mark.parametrize("name", ["extragradient", "sam"])
def test_a_blocks_second_gradient_leaves_what_earlier_blocks_added(
    name: str, zeroing: bool, none: bool
) -> None:
    model, optimizer, extrapolation = a_loop(name)
    found = []
    for update, count in enumerate(BLOCKS):
        optimizer.zero_grad(set_to_none=none)
        for block in range(count):

            def second(update: int = update, block: int = block) -> None:
                if zeroing:
                    optimizer.zero_grad(set_to_none=none)
                backward(model, 0, update, block)

            with extrapolation.shifted(gradient=second):
                backward(model, 0, update, block)
        optimizer.step()
        found.append(flat(model))
    assert_same(found, train_naively(name, BLOCKS, base=base_of(name)))


@pytest.mark.parametrize(
    "direction",
    [
        GaussianNoise(size=0.1, norm_and_bias=True),
        SmoothOut(size=0.1, norm_and_bias=True),
        LocalGradient(ratio=0.5),
        DIRECTIONS["average of updates"],
    ],
    ids=["gaussian", "smoothout", "local", "average of updates"],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_every_block_of_an_update_has_the_same_shift_and_the_next_update_another(
    direction: Direction, workers: int
) -> None:
    def shifts(blocks: Sequence[int]) -> list[dict[int, list[Tensor]]]:
        model = network()
        optimizer = base_of("")(model)
        extrapolation = Extrapolation(optimizer, direction, workers)
        found = []
        for update, count in enumerate(blocks):
            seen: dict[int, list[Tensor]] = {k: [] for k in range(workers)}
            optimizer.zero_grad()
            before = flat(model)
            for block in range(count):
                for k in range(workers):
                    with extrapolation.shifted(k):
                        seen[k].append(flat(model))
                        backward(model, k, update, block)
                    assert torch.equal(flat(model), before)
            optimizer.step()
            found.append(seen)
        return found

    found = shifts((1, 3, 2))
    for seen in found:
        for same in seen.values():
            assert all(torch.equal(weights, same[0]) for weights in same)
    model = network()
    first = [found[0][k][0] - flat(model) for k in range(workers)]
    if isinstance(direction, GaussianNoise | SmoothOut):
        assert all(z.abs().min() > 0 for z in first)
        if workers > 1:
            assert not torch.equal(first[0], first[1])
        # As many blocks as there are, the noise of an update is the same.
        one = shifts((1, 1, 1))
        assert torch.equal(one[0][0][0], found[0][0][0])


def test_noise_of_an_update_does_not_depend_on_the_number_of_blocks() -> None:
    def noise_of_the_last_update(blocks: Sequence[int]) -> Tensor:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        extrapolation = Extrapolation(optimizer, GaussianNoise(size=0.1, norm_and_bias=True))
        for update, count in enumerate(blocks):
            optimizer.zero_grad()
            for block in range(count):
                with extrapolation.shifted():
                    seen = flat(model)
                    backward(model, 0, update, block)
            optimizer.step()
        return seen

    expected = noise_of_the_last_update((1, 1, 1))
    assert torch.equal(noise_of_the_last_update((4, 2, 3)), expected)
    assert not torch.equal(noise_of_the_last_update((1, 1)), expected)


# Several workers in one process.


@pytest.mark.parametrize("order", ["block by block", "worker by worker"])
@pytest.mark.parametrize("none", [True, False], ids=["to None", "to zero"])
@pytest.mark.parametrize("name", SEVERAL)
def test_workers_that_add_into_one_gradient_remember_what_their_blocks_added(
    name: str, none: bool, order: str
) -> None:
    model, optimizer, extrapolation = a_loop(name, 3)
    found = []
    for update, count in enumerate(BLOCKS):
        optimizer.zero_grad(set_to_none=none)
        turns = [(k, b) for b in range(count) for k in range(3)]
        for k, block in sorted(turns) if order == "worker by worker" else turns:
            again = functools.partial(backward, model, k, update, block, 1 / 3)
            with extrapolation.shifted(k, gradient=again):
                again()
        optimizer.step()
        found.append(flat(model))
    if name == "gradient-noise":
        # What each has added, less the mean.
        expected = train_with_shares("gradient-noise", 3)
    elif name == "extragradient":
        expected = train_with_shares("extragradient", 3)
    else:
        expected = train_naively(name, BLOCKS, workers=3, share=1 / 3)
    assert_same(found, expected)


def train_with_shares(name: str, workers: int) -> Trajectory:
    """Return the naive loop of workers whose losses are a part of the whole."""
    net = network()
    optimizer = base_of(name)(net)
    parameters = list(net.parameters())
    zero = [torch.zeros_like(p) for p in parameters]
    own, mean = [zero] * workers, zero
    found = []

    def gradient(k: int, t: int, b: int) -> list[Tensor]:
        return list(torch.autograd.grad(loss_of(net, k, t, b) / workers, parameters))

    for t, count in enumerate(BLOCKS):
        x = [p.detach().clone() for p in parameters]
        made = []
        for k in range(workers):
            total = zero
            for b in range(count):
                if name == "extragradient":
                    along = gradient(k, t, b)
                else:
                    along = [g - m for g, m in zip(own[k], mean, strict=True)]
                with torch.no_grad():
                    for p, w, z in zip(parameters, x, along, strict=True):
                        p.copy_(w - 0.5 * 0.1 * z)
                total = [a + g for a, g in zip(total, gradient(k, t, b), strict=True)]
                with torch.no_grad():
                    for p, w in zip(parameters, x, strict=True):
                        p.copy_(w)
            made.append(total)
        own, mean = made, [sum(gs) for gs in zip(*made, strict=True)]
        for p, g in zip(parameters, mean, strict=True):
            p.grad = g
        optimizer.step()
        found.append(flat(net))
    return found


def test_workers_may_have_different_numbers_of_blocks() -> None:
    x = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=0.1)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=1.0), workers=3)
    found = []
    for turns in (((0, 1), (1, 3), (0, 2)), ((1, 1), (0, 1)), ((0, 1), (1, 1), (2, 2))):
        optimizer.zero_grad()
        for worker, a in turns:
            with extrapolation.shifted(worker):
                torch.autograd.backward(a * x * x / 2)
        optimizer.step()
        found.append(x.item())
    # 1: x = 1, g0 = 1 + 2, g1 = 3: x = 0.4.
    # 2: worker 1 at 0.4 − 0.3: g1 = 0.1; worker 0 at 0.4 − 0.3: g0 = 0.1: x = 0.38.
    # 3: workers 0 and 1 at 0.37, worker 2 at 0.38: g = 0.37 + 0.37 + 0.76: x = 0.23.
    assert found == pytest.approx([0.4, 0.38, 0.23], abs=1e-15)


@pytest.mark.parametrize("mean", ["new", "in place"])
@pytest.mark.parametrize("zeroed", ["before", "inside"])
@pytest.mark.parametrize("none", [True, False], ids=["to None", "to zero"])
@pytest.mark.parametrize("name", SEVERAL)
def test_workers_that_begin_at_zero_while_the_loop_sets_the_mean(
    name: str, none: bool, zeroed: str, mean: str
) -> None:
    model, optimizer, extrapolation = a_loop(name, 3)
    found = []
    for update, count in enumerate(BLOCKS):
        gradients = []
        for k in range(3):
            if zeroed == "before":
                optimizer.zero_grad(set_to_none=none)
            for block in range(count):
                again = functools.partial(backward, model, k, update, block)
                with extrapolation.shifted(k, gradient=again):
                    if zeroed == "inside" and block == 0:
                        optimizer.zero_grad(set_to_none=none)
                    again()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for p, *own in zip(model.parameters(), *gradients, strict=True):
            if mean == "new":
                p.grad = torch.stack(own).mean(dim=0)
            else:
                p.grad.copy_(torch.stack(own).mean(dim=0))
        optimizer.step()
        found.append(flat(model))
    assert_same(found, train_naively(name, BLOCKS, workers=3))


@pytest.mark.parametrize("name", ["local", "gradient-noise"])
def test_a_sum_that_the_loop_divides_is_a_mean_once_it_says_so(name: str) -> None:
    model, optimizer, extrapolation = a_loop(name, 2)
    found = []
    for update, count in enumerate(BLOCKS):
        optimizer.zero_grad()
        for block in range(count):
            for k in range(2):
                with extrapolation.shifted(k):
                    backward(model, k, update, block)
        for p in model.parameters():
            p.grad.div_(2)
        extrapolation.averaged()
        optimizer.step()
        found.append(flat(model))
    assert_same(found, train_naively(name, BLOCKS, workers=2))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_workers_share_a_gradient_that_has_a_graph() -> None:
    model, optimizer, extrapolation = a_loop("local", 2)
    found = []
    for update, count in enumerate(BLOCKS):
        optimizer.zero_grad()
        for block in range(count):
            for k in range(2):
                with extrapolation.shifted(k):
                    (loss_of(model, k, update, block) / 2).backward(create_graph=True)
        optimizer.step()
        found.append(flat(model))
    assert_same(found, train_naively("local", BLOCKS, workers=2, share=1 / 2))


def test_workers_do_not_share_a_gradient_that_is_replaced_by_hand() -> None:
    """It cannot be told from one that was zeroed."""
    model, _, extrapolation = a_loop("local", 2)

    def block(k: int) -> None:
        with extrapolation.shifted(k):
            gradients = torch.autograd.grad(loss_of(model, k, 0, 0), list(model.parameters()))
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.grad = g if p.grad is None else p.grad + g

    block(0)
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"replaced in the block.*call backward\(\) in it"):
        block(1)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


# Saved, copied, left out, interrupted.


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_loop_saved_between_updates_goes_on_bit_for_bit(name: str, workers: int) -> None:
    def make() -> Loop:
        return a_loop(name, workers)

    def go(loop: Loop, start: int, end: int) -> None:
        model, optimizer, extrapolation = loop
        for update in range(start, end):
            optimizer.zero_grad()
            for block in range(BLOCKS[update]):
                for k in range(workers):
                    again = functools.partial(backward, model, k, update, block, 1 / workers)
                    with extrapolation.shifted(k, gradient=again):
                        again()
            optimizer.step()

    whole, first, then = make(), make(), make()
    go(whole, 0, 5)
    go(first, 0, 3)
    # The one that is loaded has a past of its own, and blocks whose update was left out.
    go(then, 3, 5)
    with then[2].shifted(0, gradient=lambda: backward(then[0], 0, 0, 0)):
        backward(then[0], 0, 0, 0)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, state in zip(then, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    go(then, 3, 5)
    assert torch.equal(flat(then[0]), flat(whole[0]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loop: pickle.loads(pickle.dumps(loop))])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_goes_on_by_itself(name: str, copied: Callable[[Any], Any]) -> None:
    expected = train_naively(name, BLOCKS, base=base_of(name))
    loop = a_loop(name)
    assert_same(train(loop, BLOCKS[:2]), expected[:2])
    other = copied(loop)
    with other[2].shifted(gradient=lambda: backward(other[0], 0, 7, 7)):
        backward(other[0], 0, 7, 7)
    assert_same(train(loop, start=2), expected[2:])
    assert_same(train(other, start=2), expected[2:])


@pytest.mark.parametrize("none", [True, False], ids=["to None", "to zero"])
@pytest.mark.parametrize("name", NAMES)
def test_an_update_that_is_left_out_leaves_no_trace(name: str, none: bool) -> None:
    model, optimizer, extrapolation = a_loop(name)
    found = []
    for update, count in enumerate(BLOCKS):
        optimizer.zero_grad(set_to_none=none)
        for block in range(count):
            again = functools.partial(backward, model, 0, update, block)
            with extrapolation.shifted(gradient=again):
                again()
        if update in (1, 3):
            optimizer.zero_grad(set_to_none=none)
        else:
            optimizer.step()
        found.append(flat(model))
    assert extrapolation.steps == 3
    assert_same(found, train_naively(name, BLOCKS, base=base_of(name), skipped=(1, 3)))


def refused(
    extrapolation: Extrapolation, model: nn.Module, k: int, update: int, block: int
) -> str | None:
    try:
        with extrapolation.shifted(k):
            backward(model, k, update, block)
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("none", [True, False], ids=["to None", "to zero"])
@pytest.mark.parametrize("form", ["added", "mean"])
@pytest.mark.parametrize("says", [True, False], ids=["said", "not said"])
@pytest.mark.parametrize("name", ["local", "gradient-noise", "optimistic", "noise"])
def test_an_update_of_several_workers_is_left_out_in_so_many_words(
    name: str, says: bool, form: str, none: bool
) -> None:
    """Where the loop does not say so, it is told to; it never goes on with another shift."""
    model, optimizer, extrapolation = a_loop(name, 2)
    found = []
    for update, count in enumerate(BLOCKS):
        gradients = []
        optimizer.zero_grad(set_to_none=none)
        for k in range(2):
            if form == "mean":
                optimizer.zero_grad(set_to_none=none)
            for block in range(count):
                refusal = refused(extrapolation, model, k, update, block)
                if refusal is not None:
                    assert not says
                    assert "skip_update()" in refusal
                    return
            gradients.append([p.grad.clone() for p in model.parameters()])
        for p, *own in zip(model.parameters(), *gradients, strict=True):
            p.grad = torch.stack(own).mean(dim=0) if form == "mean" else p.grad / 2
        extrapolation.averaged()
        if update not in (1, 3):
            optimizer.step()
        elif says:
            extrapolation.skip_update()
        found.append(flat(model))
    assert_same(found, train_naively(name, BLOCKS, workers=2, skipped=(1, 3)))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["local", "gradient-noise"])
def test_what_a_failing_block_added_is_taken_away_where_workers_share_a_gradient(
    name: str, error: type[BaseException]
) -> None:
    model, optimizer, extrapolation = a_loop(name, 2)
    found = []
    for update, count in enumerate(BLOCKS):
        optimizer.zero_grad()
        for block in range(count):
            for k in range(2):
                again = functools.partial(backward, model, k, update, block, 1 / 2)
                if (block, k) != (0, 0):
                    with (
                        contextlib.suppress(error),
                        extrapolation.shifted(k, gradient=again),
                    ):
                        again()
                        raise error
                with extrapolation.shifted(k, gradient=again):
                    again()
        optimizer.step()
        found.append(flat(model))
    if name == "gradient-noise":
        expected = train_with_shares(name, 2)
    else:
        expected = train_naively(name, BLOCKS, workers=2, share=1 / 2)
    assert_same(found, expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", [name for name in SEVERAL if name != "gradient-noise"])
def test_a_block_that_fails_amid_an_update_can_be_taken_again(
    name: str, workers: int, error: type[BaseException]
) -> None:
    def final_weights(failing: bool) -> Tensor:
        model, optimizer, extrapolation = a_loop(name, workers)
        for update, count in enumerate(BLOCKS):
            optimizer.zero_grad()
            for block in range(count):
                for k in range(workers):
                    again = functools.partial(backward, model, k, update, block)
                    if failing:
                        before = flat(model)
                        with (
                            contextlib.suppress(error),
                            extrapolation.shifted(k, gradient=again),
                        ):
                            raise error
                        assert torch.equal(flat(model), before)
                    with extrapolation.shifted(k, gradient=again):
                        again()
            optimizer.step()
        return flat(model)

    assert torch.equal(final_weights(failing=True), final_weights(failing=False))


def test_a_second_gradient_that_fails_leaves_the_weights_where_they_are() -> None:
    """Also before the first block of an update, whose weights nobody has copied."""
    loop = a_loop("sam")
    train(loop, BLOCKS[:2])
    before = flat(loop[0])
    loop[1].zero_grad()
    with contextlib.suppress(ZeroDivisionError), loop[2].shifted(gradient=lambda: 1 / 0):
        pass
    assert torch.equal(flat(loop[0]), before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["extragradient", "sam"])
def test_a_second_gradient_that_fails_leaves_the_gradients_of_earlier_blocks(
    name: str, error: type[BaseException]
) -> None:
    model, optimizer, extrapolation = a_loop(name)
    found = []
    for update, count in enumerate(BLOCKS):
        optimizer.zero_grad()
        for block in range(count):
            again = functools.partial(backward, model, 0, update, block)

            def failing() -> None:
                optimizer.zero_grad()
                raise error

            with contextlib.suppress(error), extrapolation.shifted(gradient=failing):
                pass
            with extrapolation.shifted(gradient=again):
                again()
        optimizer.step()
        found.append(flat(model))
    assert_same(found, train_naively(name, BLOCKS, base=base_of(name)))


def test_an_average_of_updates_sees_the_weights_that_were_loaded_after_a_block() -> None:
    """Its block's update was left out, and the next step has none."""
    model, optimizer, extrapolation = a_loop("average of updates")
    other = {name: value + 1.0 for name, value in model.state_dict().items()}
    with extrapolation.shifted():
        backward(model, 0, 0, 0)
    model.load_state_dict(other)
    before = flat(model)
    optimizer.zero_grad()
    backward(model, 0, 0, 1)
    optimizer.step()
    average = torch.cat(
        [t.flatten() for t in extrapolation.state_dict()["shared_state"]["average"]]
    )
    torch.testing.assert_close(average, 0.3 * (flat(model) - before), rtol=0, atol=1e-14)


def test_weights_loaded_between_a_block_and_its_step_stay_loaded() -> None:
    model, _, extrapolation = a_loop("local")
    with extrapolation.shifted():
        backward(model, 0, 0, 0)
    model.load_state_dict({name: value + 1.0 for name, value in model.state_dict().items()})
    before = flat(model)
    with extrapolation.shifted():
        backward(model, 0, 0, 1)
    assert torch.equal(flat(model), before)


def test_weights_of_no_and_of_no_more_than_one_dimension_take_part() -> None:
    for name, direction in DIRECTIONS.items():
        scalar, empty, row = (
            nn.Parameter(torch.full(shape, 0.5, dtype=torch.float64))
            for shape in ((), (0, 3), (2,))
        )
        optimizer = torch.optim.SGD([empty, scalar, row], lr=0.1, momentum=0.9)
        extrapolation = Extrapolation(optimizer, direction)
        if name == "gradient-noise":
            continue

        def step(optimizer: Any = optimizer, extrapolation: Any = extrapolation) -> bool:
            def again() -> None:
                torch.autograd.backward(
                    scalar.square() + row.square().sum() + empty.sum()  # noqa: B023
                )

            optimizer.zero_grad()
            for _ in range(2):
                with extrapolation.shifted(gradient=again):
                    moved = scalar.item() != 0.5  # noqa: B023
                    again()
            optimizer.step()
            return moved

        step()
        with torch.no_grad():
            scalar.fill_(0.5)
        assert step()
        assert empty.shape == (0, 3)
        assert all(p.isfinite().all() for p in (scalar, row))


def test_a_look_at_the_shifted_weights_in_inference_mode_changes_nothing() -> None:
    expected = train_naively("local", BLOCKS)
    loop = a_loop("local")
    model, _, extrapolation = loop
    found = train(loop, BLOCKS[:2])
    with torch.inference_mode(), contextlib.suppress(RuntimeError), extrapolation.shifted():
        assert not torch.equal(flat(model), found[-1])
    found += train(loop, start=2)
    assert_same(found, expected)


def test_a_first_block_in_inference_mode_leaves_training_as_it_is() -> None:
    loop = a_loop("local")
    with torch.inference_mode(), contextlib.suppress(RuntimeError), loop[2].shifted():
        pass
    assert_same(train(loop), train_naively("local", BLOCKS))


def test_one_optimizer_may_have_two_extrapolations_in_turn() -> None:
    """Updates without its blocks are none of its past."""
    x = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=0.1)
    first, second = (Extrapolation(optimizer, LocalGradient(ratio=1.0)) for _ in range(2))
    found = []
    for extrapolation in (first, first, second, second):
        optimizer.zero_grad()
        for _ in range(2):
            with extrapolation.shifted():
                torch.autograd.backward(x * x / 2)
        optimizer.step()
        found.append(x.item())
    # Gradients 2·y at y = 1 and 0.8 − 0.2, and then 0.68 and 0.544 − 0.136.
    assert found == pytest.approx([0.8, 0.68, 0.544, 0.4624], abs=1e-15)


def test_two_extrapolations_of_the_same_weights_at_once_are_refused() -> None:
    model = network()
    optimizer = base_of("local")(model)
    first, second = (Extrapolation(optimizer, LocalGradient(ratio=1.0)) for _ in range(2))
    before = flat(model)
    refused = pytest.raises(RuntimeError, match="shift them by another Extrapolation, outside")
    with refused, first.shifted(), second.shifted():
        backward(model, 0, 0, 0)
    assert torch.equal(flat(model), before)


def test_an_extrapolation_that_is_let_go_takes_its_memory_with_it() -> None:
    """Its optimizer stays, and with it the hooks."""
    model = network()
    optimizer = base_of("optimistic")(model)
    watched = []

    class Watching(OptimisticGradient):
        def observe_mean_gradient(self, state: State, gradients: list[Tensor]) -> None:
            watched.append(self.ratio)
            super().observe_mean_gradient(state, gradients)

    first = Extrapolation(optimizer, Watching(ratio=0.5))
    one_update((model, optimizer, first), 0, 1)
    memory = weakref.ref(first._kept.shared["mean_gradient"][0])
    del first
    gc.collect()
    second = Extrapolation(optimizer, Watching(ratio=0.25))
    one_update((model, optimizer, second), 1, 1)
    assert memory() is None
    assert watched == [0.5, 0.25]


def test_a_direction_may_be_set_to_another_length_between_updates() -> None:
    lengths = (0.5, 0.5, 0.2, 0.2, 0.0)
    x = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=0.1)
    extrapolation = Extrapolation(optimizer, GradientAverage(ratio=lengths[0]))
    weight, average = 1.0, 0.0
    for ratio in lengths:
        extrapolation.direction = GradientAverage(ratio=ratio)
        optimizer.zero_grad()
        with extrapolation.shifted():
            torch.autograd.backward(x * x / 2)
        optimizer.step()
        gradient = weight - 0.1 * ratio * average
        weight, average = weight - 0.1 * gradient, ratio * average + gradient
        assert x.item() == pytest.approx(weight, abs=1e-15)


class GradientAverage(OptimisticGradient):
    """The ratio is the decay of the gradients' average as well."""

    def observe_mean_gradient(self, state: State, gradients: list[Tensor]) -> None:
        assert self.ratio is not None
        torch._foreach_mul_(state["mean_gradient"], self.ratio)
        torch._foreach_add_(state["mean_gradient"], gradients)


def test_a_direction_of_another_kind_needs_an_extrapolation_of_its_own() -> None:
    model = network()
    extrapolation = Extrapolation(base_of("local")(model), LocalGradient(ratio=0.5))
    with pytest.raises(ValueError, match="make a new Extrapolation"):
        extrapolation.direction = OptimisticGradient(ratio=0.5)
    rmsprop = torch.optim.RMSprop(model.parameters(), momentum=0.9)
    extrapolation = Extrapolation(rmsprop, MSAM(radius=0.5))
    rmsprop.param_groups[0]["momentum"] = 0.0
    with pytest.raises(ValueError, match="needs momentum"):
        extrapolation.direction = MSAM(radius=0.1)
    assert extrapolation.direction == MSAM(radius=0.5)


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_a_rate_that_is_a_tensor() -> None:
    model = network()
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, foreach=False)
    extrapolation = Extrapolation(optimizer, DIRECTIONS["local"])
    loop = model, optimizer, extrapolation
    assert_same(train(loop), train_naively("local", BLOCKS, base=plain_sgd))


def test_a_bare_model_may_be_named_in_a_loop_of_one_process() -> None:
    model = network()
    optimizer = base_of("local")(model)
    loop = model, optimizer, Extrapolation(optimizer, DIRECTIONS["local"], model=model)
    assert_same(train(loop), train_naively("local", BLOCKS))
