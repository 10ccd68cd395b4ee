"""Two processes: with DistributedDataParallel in its forms, and averaging by themselves."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import on_two_ranks, process_group
from naive_loop import (
    DIRECTIONS,
    Trajectory,
    adam,
    assert_same,
    base_of,
    flat,
    loss_of,
    network,
    norm_clipped,
    sgd,
    train_naively,
)
from test_loops_foreign_parameters import TwoHeads, mixed
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from egtrain.optim import Extrapolation, GaussianNoise, LocalGradient

pytestmark = pytest.mark.timeout(180)

BLOCKS = (2, 1, 3, 1, 2, 1)
LIMIT = 1.5
NAMES = list(DIRECTIONS)
OWN = ["local", "gradient-noise"]
"""Those that remember the process's own gradient."""
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "a bucket for each parameter": {"bucket_cap_mb": 1e-5},
    "looking for unused": {"find_unused_parameters": True},
}
Model = Callable[[], nn.Module]
Loss = Callable[[nn.Module, int, int, int], Tensor]


# What each rank does.


def backward(loss: Loss, model: nn.Module, update: int, block: int, factor: float = 1.0) -> None:
    torch.autograd.backward(factor * loss(model, dist.get_rank(), update, block))


def averaging(model: DistributedDataParallel, last: bool) -> Any:
    return contextlib.nullcontext() if last else model.no_sync()


def train(
    name: str,
    *,
    model: Model = network,
    loss: Loss = loss_of,
    base: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    blocks: Sequence[int] = BLOCKS,
    clip: float | None = None,
    inside: bool = False,
    zeroed: str = "before",
    none: bool = True,
    aware: bool = True,
    call: Callable[[nn.Module], nn.Module] = lambda wrapped: wrapped,
    **options: Any,
) -> Trajectory:
    """Train with DDP, several blocks an update, all but the last without an average."""
    net = model()
    wrapped = DistributedDataParallel(net, **options)
    optimizer = (base or base_of(name))(net)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name], model=wrapped if aware else None)
    called = call(wrapped)
    found = []
    for update, count in enumerate(blocks):
        if zeroed == "before":
            optimizer.zero_grad(set_to_none=none)
        for block in range(count):

            def second(update: int = update, block: int = block) -> None:
                with wrapped.no_sync():
                    backward(loss, called, update, block)

            with extrapolation.shifted(gradient=second):
                if zeroed == "inside" and block == 0:
                    optimizer.zero_grad(set_to_none=none)
                with averaging(wrapped, block + 1 == count):
                    backward(loss, called, update, block)
                if clip is not None and inside and block + 1 == count:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
        if clip is not None and not inside:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        found.append(flat(net))
    return found


def train_scaled(
    name: str, base: Callable[[nn.Module], Any], unscaled: str, none: bool
) -> Trajectory:
    """Train with a GradScaler; the third update overflows on one rank."""
    net = network()
    wrapped = DistributedDataParallel(net, gradient_as_bucket_view=not none)
    optimizer = base(net)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name], model=wrapped)
    scaler = torch.amp.GradScaler("cpu", init_scale=0.5, growth_interval=2)
    found = []
    for update, count in enumerate(BLOCKS):
        optimizer.zero_grad(set_to_none=none)
        for block in range(count):
            last = block + 1 == count
            overflows = update == 2 and last and dist.get_rank() == 1
            with extrapolation.shifted(), averaging(wrapped, last):
                loss = loss_of(wrapped, dist.get_rank(), update, block)
                torch.autograd.backward(scaler.scale(loss * (math.inf if overflows else 1.0)))
                if last and unscaled == "inside":
                    scaler.unscale_(optimizer)
        if unscaled == "after":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        found.append(flat(net))
    return found


def train_with_closures(name: str) -> Trajectory:
    """Train with the last block and clipping in the closure of the step."""
    net = network()
    wrapped = DistributedDataParallel(net)
    optimizer = base_of(name)(net)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name], model=wrapped)
    found = []
    for update, count in enumerate(BLOCKS):
        optimizer.zero_grad()
        for block in range(count - 1):
            with extrapolation.shifted(), wrapped.no_sync():
                backward(loss_of, wrapped, update, block)

        def closure(update: int = update, count: int = count) -> None:
            with extrapolation.shifted():
                backward(loss_of, wrapped, update, count - 1)
            nn.utils.clip_grad_norm_(net.parameters(), LIMIT)

        optimizer.step(closure)  # type: ignore[arg-type]
        found.append(flat(net))
    return found


def train_leaving_out(name: str, *, averaged: bool, none: bool) -> Trajectory:
    """Train, and leave out the update 2 after its last block, or before its average."""
    net = network()
    wrapped = DistributedDataParallel(net)
    optimizer = base_of(name)(net)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name], model=wrapped)
    found = []
    for update, count in enumerate(BLOCKS):
        optimizer.zero_grad(set_to_none=none)
        for block in range(count):
            last = block + 1 == count
            if update == 2 and last and not averaged:
                continue
            with extrapolation.shifted(), averaging(wrapped, last):
                backward(loss_of, wrapped, update, block)
        if update != 2:
            optimizer.step()
        found.append(flat(net))
    return found


def train_failing(name: str) -> Trajectory:
    """Train; the last block of update 2 fails after its average."""
    net = network()
    wrapped = DistributedDataParallel(net)
    optimizer = base_of(name)(net)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name], model=wrapped)
    found = []
    for update, count in enumerate(BLOCKS):
        optimizer.zero_grad()
        with contextlib.suppress(KeyboardInterrupt):
            for block in range(count):
                last = block + 1 == count
                with extrapolation.shifted(), averaging(wrapped, last):
                    backward(loss_of, wrapped, update, block)
                    if update == 2 and last:
                        raise KeyboardInterrupt
            optimizer.step()
        found.append(flat(net))
    return found


def loss_of_unused(model: nn.Module, worker: int, update: int, block: int) -> Tensor:
    """Return a loss through a head that one process leaves out, another one in each update."""
    heads = (0,) if worker == update % 2 else (0, 1)
    if isinstance(model, DistributedDataParallel):
        outputs = model(inputs_of(worker, update, block), heads)
    else:
        outputs = SomeHeads.forward(model, inputs_of(worker, update, block), heads)  # type: ignore[arg-type]
    return (outputs - 1.0).square().sum()


def inputs_of(worker: int, update: int, block: int) -> Tensor:
    generator = torch.Generator().manual_seed(10_000 * worker + 100 * update + block)
    return torch.randn(5, 3, generator=generator, dtype=torch.float64) / 3


class SomeHeads(TwoHeads):
    """The sum of some of its heads."""

    def forward(self, inputs: Tensor, heads: tuple[int, ...]) -> Tensor:
        hidden = torch.tanh(self.body(inputs))
        outputs: Tensor = sum(self.heads[i](hidden) for i in heads)
        return outputs


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)


def train_by_itself(name: str, *, clip: float | None = None, says: bool = True) -> Trajectory:
    """Average in the loop, without DDP."""
    rank = dist.get_rank()
    net = network()
    optimizer = base_of(name)(net)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name], workers=range(rank, rank + 1))
    found = []
    for update, count in enumerate(BLOCKS):
        optimizer.zero_grad()
        for block in range(count):
            again = functools.partial(backward, loss_of, net, update, block)
            with extrapolation.shifted(gradient=again):
                again()
        for p in net.parameters():
            dist.all_reduce(p.grad)
            p.grad.div_(2)
        if says:
            extrapolation.averaged()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        found.append(flat(net))
    return found


def two_optimizers(*, shared_block: bool = True) -> Trajectory:
    """Train one model by two optimizers with a direction each."""
    net = network()
    wrapped = DistributedDataParallel(net)
    optimizers = [
        torch.optim.SGD(net[0].parameters(), lr=0.1, momentum=0.9, nesterov=True),
        torch.optim.SGD(net[2].parameters(), lr=0.1, momentum=0.9, nesterov=True),
    ]
    first, second = (Extrapolation(o, DIRECTIONS["local"], model=wrapped) for o in optimizers)
    found = []
    for update, count in enumerate(BLOCKS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for block in range(count):
            with first.shifted(), second.shifted(), averaging(wrapped, block + 1 == count):
                backward(loss_of, wrapped, update, block)
        for optimizer in optimizers:
            optimizer.step()
        found.append(flat(net))
    return found


def two_models() -> Trajectory:
    """Train two wrapped models, one after the other, by one optimizer."""
    net = network()
    parts = [DistributedDataParallel(net[i]) for i in (0, 2)]
    optimizer = base_of("local")(net)
    extrapolation = Extrapolation(optimizer, DIRECTIONS["local"], model=parts)
    both = nn.Sequential(parts[0], nn.Tanh(), parts[1])
    found = []
    for update, count in enumerate(BLOCKS):
        optimizer.zero_grad()
        for block in range(count):
            last = block + 1 == count
            with extrapolation.shifted(), averaging(parts[0], last), averaging(parts[1], last):
                backward(loss_of, both, update, block)
        optimizer.step()
        found.append(flat(net))
    return found


def remembered(hook: Any, first: str) -> dict[str, Tensor]:
    """Return what a rank remembers with a compression hook, its own gradient, and `.grad`."""
    net = network()
    wrapped = DistributedDataParallel(net)
    optimizer = plain_sgd(net)
    if first == "hook":
        wrapped.register_comm_hook(wrapped.process_group, hook)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=0.5), model=wrapped)
    if first != "hook":
        wrapped.register_comm_hook(wrapped.process_group, hook)
    for update in range(3):
        optimizer.zero_grad()
        with extrapolation.shifted():
            loss = loss_of(net, dist.get_rank(), update, 0)
            own = torch.autograd.grad(loss, list(net.parameters()))
            backward(loss_of, wrapped, update, 0)
        gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
        optimizer.step()
    (rows,) = extrapolation.state_dict()["worker_state"].values()
    return {
        "remembered": torch.cat([row.flatten() for row in rows]),
        "own": torch.cat([g.flatten() for g in own]),
        "gradient": gradient,
        "weights": flat(net),
    }


def rounded_to_bf16(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Do as torch's hook, which DDP takes with NCCL alone."""
    return default_hooks.bf16_compress_hook(state, bucket)


def noise_of_ranks() -> list[Tensor]:
    """Return the shift of each of two updates."""
    net = network()
    wrapped = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    extrapolation = Extrapolation(
        optimizer, GaussianNoise(size=0.1, norm_and_bias=True), model=wrapped, seed=4
    )
    found = []
    for update in range(2):
        with extrapolation.shifted():
            found.append(flat(net))
            backward(loss_of, wrapped, update, 0)
        optimizer.step()
    return found


def resumed(name: str) -> Trajectory:
    """Train with DDP, and go on from what was saved, in a new process group's loop."""

    def loop() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, Extrapolation]:
        net = network()
        wrapped = DistributedDataParallel(net)
        optimizer = base_of(name)(net)
        return net, wrapped, optimizer, Extrapolation(optimizer, DIRECTIONS[name], model=wrapped)

    def go(loop: Any, start: int, end: int) -> Trajectory:
        net, wrapped, optimizer, extrapolation = loop
        found = []
        for update in range(start, end):
            optimizer.zero_grad()
            for block in range(BLOCKS[update]):
                with extrapolation.shifted(), averaging(wrapped, block + 1 == BLOCKS[update]):
                    backward(loss_of, wrapped, update, block)
            if update % 2:
                nn.utils.clip_grad_norm_(net.parameters(), LIMIT)
            optimizer.step()
            found.append(flat(net))
        return found

    first, then, whole = loop(), loop(), loop()
    expected = go(whole, 0, len(BLOCKS))
    found = go(first, 0, 2)
    go(then, 3, 5)
    for i in (0, 2, 3):
        then[i].load_state_dict(first[i].state_dict())
    found += go(then, 2, len(BLOCKS))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return found


def saved_state(name: str) -> dict[str, Any]:
    """Return the state of an extrapolation after some updates with DDP."""
    net = network()
    wrapped = DistributedDataParallel(net)
    optimizer = base_of(name)(net)
    extrapolation = Extrapolation(optimizer, DIRECTIONS[name], model=wrapped)
    for update in range(3):
        optimizer.zero_grad()
        with extrapolation.shifted():
            backward(loss_of, wrapped, update, 0)
        optimizer.step()
    return extrapolation.state_dict()


def compiled(options: dict[str, Any]) -> Trajectory:
    def call(wrapped: nn.Module) -> nn.Module:
        module: nn.Module = torch.compile(wrapped, **options)  # type: ignore[assignment]
        return module

    return train("local", call=call)


# Mistakes.


def outcome(case: Callable[[], object]) -> object:
    """Return a case's result, or the message of its error."""
    try:
        return case()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def first_steps(
    direction: Any,
    *,
    workers: int | range | None = None,
    state: dict[str, Any] | None = None,
    aware: bool = False,
    steps: int = 1,
) -> None:
    """Train with DDP for an update without telling the extrapolation of it."""
    net = network()
    wrapped = DistributedDataParallel(net)
    optimizer = plain_sgd(net)
    extrapolation = Extrapolation(optimizer, direction, workers, model=wrapped if aware else None)
    if state is not None:
        extrapolation.load_state_dict(state)
    for update in range(steps):
        optimizer.zero_grad()
        with extrapolation.shifted():
            backward(loss_of, wrapped, update, 0)
        optimizer.step()


def wrapped_later(state: dict[str, Any] | None) -> None:
    """Make the extrapolation before the model is wrapped."""
    rank = dist.get_rank()
    net = network()
    optimizer = plain_sgd(net)
    extrapolation = Extrapolation(
        optimizer, LocalGradient(ratio=1.0), workers=range(rank, rank + 1)
    )
    if state is not None:
        extrapolation.load_state_dict(state)
    wrapped = DistributedDataParallel(net)
    with extrapolation.shifted():
        backward(loss_of, wrapped, 0, 0)
    extrapolation.averaged()
    optimizer.step()


def one_block(net: nn.Module, extrapolation: Extrapolation) -> None:
    wrapped = DistributedDataParallel(net)
    with extrapolation.shifted():
        backward(loss_of, wrapped, 0, 0)


def averaged_in_each_block() -> None:
    net = network()
    wrapped = DistributedDataParallel(net)
    extrapolation = Extrapolation(plain_sgd(net), LocalGradient(ratio=1.0), model=wrapped)
    for block in range(2):
        with extrapolation.shifted():
            backward(loss_of, wrapped, 0, block)


def one_model_after_the_other() -> None:
    """Take the backward pass of each of two models in a block of its own."""
    net = network()
    parts = [DistributedDataParallel(net[i]) for i in (0, 2)]
    extrapolation = Extrapolation(plain_sgd(net), LocalGradient(ratio=1.0), model=parts)
    inputs = [inputs_of(dist.get_rank(), 0, 0), torch.ones(2, 4, dtype=torch.float64)]
    for part, values in zip(parts, inputs, strict=True):
        with extrapolation.shifted():
            torch.autograd.backward(part(values).square().sum())


def added_to_an_average() -> None:
    """Add a micro-batch without an average to one with it."""
    net = network()
    wrapped = DistributedDataParallel(net)
    extrapolation = Extrapolation(plain_sgd(net), LocalGradient(ratio=1.0), model=wrapped)
    for block in range(2):
        with extrapolation.shifted(), averaging(wrapped, block == 0):
            backward(loss_of, wrapped, 0, block)


def second_gradient_averaged(aware: bool) -> None:
    net = network()
    wrapped = DistributedDataParallel(net)
    optimizer = plain_sgd(net)
    extrapolation = Extrapolation(
        optimizer, DIRECTIONS["extragradient"], model=wrapped if aware else None
    )
    again = functools.partial(backward, loss_of, wrapped, 0, 0)
    with extrapolation.shifted(gradient=again):
        again()


def all_without_average() -> None:
    net = network()
    wrapped = DistributedDataParallel(net)
    optimizer = plain_sgd(net)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=1.0), model=wrapped)
    for block in range(2):
        with extrapolation.shifted(), wrapped.no_sync():
            backward(loss_of, wrapped, 0, block)
    optimizer.step()


def lbfgs_with_own_gradients() -> None:
    net = network()
    wrapped = DistributedDataParallel(net)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
    extrapolation = Extrapolation(optimizer, DIRECTIONS["local"], model=wrapped)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(wrapped, dist.get_rank(), 0, 0)
        torch.autograd.backward(loss)
        return loss

    extrapolation.step(closure)


def noise_without_a_model() -> None:
    first_steps(GaussianNoise(size=0.1))


def used_in_an_earlier_micro_batch_alone() -> Trajectory:
    """A head has a gradient in the first micro-batch and none in the one that is averaged."""

    def loss(model: nn.Module, worker: int, update: int, block: int) -> Tensor:
        heads = (0, 1) if block == 0 and worker == 0 else (0,)
        inputs = inputs_of(worker, update, block)
        if isinstance(model, DistributedDataParallel):
            return (model(inputs, heads) - 1.0).square().sum()
        outputs = SomeHeads.forward(model, inputs, heads)  # type: ignore[arg-type]
        return (outputs - 1.0).square().sum()

    return train(
        "local",
        model=SomeHeads,
        loss=loss,
        base=plain_sgd,
        blocks=(2, 2),
        find_unused_parameters=True,
    )


def cases() -> dict[str, Callable[[], Any]]:
    """Return what each rank does, in this order."""
    found: dict[str, Callable[[], Any]] = {}
    hooks = {"fp16": default_hooks.fp16_compress_hook, "bf16": rounded_to_bf16}
    ones = (1,) * 5
    both = (True, False)
    part = functools.partial
    for name in NAMES:
        found[name] = part(train, name)
    for form, options in FORMS.items():
        for name in (*OWN, "extragradient"):
            found[f"{form} {name}"] = part(train, name, clip=LIMIT, **options)
    found["static graph"] = part(train, "local", blocks=ones, clip=LIMIT, static_graph=True)
    for none, zeroed, view in itertools.product(both, ("before", "inside"), both):
        found[f"zeroed {none} {zeroed} {view}"] = part(
            train, "local", none=none, zeroed=zeroed, gradient_as_bucket_view=view
        )
    for name in OWN:
        found[f"clipped {name}"] = part(train, name, clip=LIMIT)
        found[f"closures {name}"] = part(train_with_closures, name)
        found[f"clipped inside {name}"] = part(train, name, clip=LIMIT, inside=True)
        found[f"limit not reached {name}"] = part(train, name, clip=1e6)
        found[f"mixed {name}"] = part(train, name, base=mixed)
        found[f"adam {name}"] = part(train, name, base=adam)
        found[f"by itself, clipped {name}"] = part(train_by_itself, name, clip=LIMIT)
        found[f"resumed {name}"] = part(resumed, name)
        found[f"failed {name}"] = part(train_failing, name)
        for averaged, none in itertools.product(both, both):
            found[f"left out {averaged} {none} {name}"] = part(
                train_leaving_out, name, averaged=averaged, none=none
            )
        for view in both:
            found[f"unused {view} {name}"] = part(
                train,
                name,
                model=SomeHeads,
                loss=loss_of_unused,
                base=plain_sgd,
                blocks=ones,
                find_unused_parameters=True,
                gradient_as_bucket_view=view,
            )
    for name in ("local", "optimistic"):
        for unscaled in ("inside", "after", "by itself"):
            for base, none in itertools.product((sgd, fused), both):
                found[f"scaled {name} {unscaled} {base.__name__} {none}"] = part(
                    train_scaled, name, base, unscaled, none
                )
    for name in ("optimistic", "msam", "average of updates", "extragradient", "sam"):
        found[f"unaware {name}"] = part(train, name, aware=False)
    for name in (*OWN, "optimistic", "noise", "extragradient"):
        found[f"by itself {name}"] = part(train_by_itself, name)
    for hook, first in itertools.product(hooks, ("hook", "extrapolation")):
        found[f"{hook} {first}"] = part(remembered, hooks[hook], first)
    found["two optimizers"] = two_optimizers
    found["two models"] = two_models
    found["gaussian"] = noise_of_ranks
    found["compiled"] = part(compiled, {"backend": "eager"})
    return found | mistakes() | {"used earlier": used_in_an_earlier_micro_batch_alone}


def everything() -> dict[str, Any]:
    """Return the outcome of all cases on this rank, or the messages of their errors."""
    early = network()
    extrapolation = Extrapolation(plain_sgd(early), LocalGradient(ratio=1.0))
    with process_group():
        found = {"made before the processes": outcome(lambda: one_block(early, extrapolation))}
        return found | {name: outcome(case) for name, case in cases().items()}


def mistakes() -> dict[str, Callable[[], object]]:
    rank = dist.get_rank()
    local = LocalGradient(ratio=1.0)
    state = saved_state("local")
    here = range(rank, rank + 1)
    return {
        "local without a model": lambda: first_steps(local),
        "local without a model, from a state": lambda: first_steps(local, state=state),
        "noise without a model": noise_without_a_model,
        "numbered without a model": lambda: first_steps(local, workers=here),
        "numbered without a model, from a state": lambda: first_steps(
            local, workers=here, state=state
        ),
        "one worker without a model": lambda: first_steps(local, workers=1),
        "wrapped later": lambda: wrapped_later(None),
        "wrapped later, from a state": lambda: wrapped_later(state),
        "not said to be averaged": lambda: train_by_itself("local", says=False),
        "averaged in each block": averaged_in_each_block,
        "one model after the other": one_model_after_the_other,
        "added to an average": added_to_an_average,
        "second gradient averaged": functools.partial(second_gradient_averaged, True),
        "second gradient averaged, unaware": functools.partial(second_gradient_averaged, False),
        "never averaged": all_without_average,
        "L-BFGS": lbfgs_with_own_gradients,
        "model and workers": lambda: first_steps(local, workers=here, aware=True),
    }


# What is expected of it.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(everything, tmp_path_factory.mktemp("loops"))


def assert_both(ranks: Any, case: str, expected: Trajectory, tolerance: float = 1e-12) -> None:
    for rank in range(2):
        assert not isinstance(ranks[rank][case], str), ranks[rank][case]
        assert_same(ranks[rank][case], expected, tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_without_an_average_and_one_with_it_are_one_update(name: str, ranks: Any) -> None:
    expected = train_naively(name, BLOCKS, workers=2, base=base_of(name))
    assert_both(ranks, name, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*OWN, "extragradient"])
def test_ddp_in_its_forms(name: str, form: str, ranks: Any) -> None:
    expected = train_naively(name, BLOCKS, workers=2, clip=norm_clipped(LIMIT))
    assert_both(ranks, f"{form} {name}", expected)


def test_a_static_graph(ranks: Any) -> None:
    expected = train_naively("local", (1,) * 5, workers=2, clip=norm_clipped(LIMIT))
    assert_both(ranks, "static graph", expected)


@pytest.mark.parametrize("view", [True, False])
@pytest.mark.parametrize("zeroed", ["before", "inside"])
@pytest.mark.parametrize("none", [True, False])
def test_gradients_zeroed_in_any_way(none: bool, zeroed: str, view: bool, ranks: Any) -> None:
    expected = train_naively("local", BLOCKS, workers=2)
    assert_both(ranks, f"zeroed {none} {zeroed} {view}", expected)


@pytest.mark.parametrize("name", OWN)
def test_the_own_gradient_is_clipped_by_the_factor_of_the_mean(name: str, ranks: Any) -> None:
    expected = train_naively(name, BLOCKS, workers=2, clip=norm_clipped(LIMIT))
    assert_both(ranks, f"clipped {name}", expected)
    assert_both(ranks, f"clipped inside {name}", expected)
    assert_both(ranks, f"closures {name}", expected)
    assert_both(ranks, f"by itself, clipped {name}", expected)


@pytest.mark.parametrize("name", OWN)
def test_a_limit_that_is_not_reached_changes_no_bit(name: str, ranks: Any) -> None:
    for rank in range(2):
        pairs = zip(ranks[rank][f"limit not reached {name}"], ranks[rank][name], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", OWN)
def test_groups_that_maximise_and_minimise(name: str, ranks: Any) -> None:
    assert_both(ranks, f"mixed {name}", train_naively(name, BLOCKS, workers=2, base=mixed))


@pytest.mark.parametrize("name", OWN)
def test_adam(name: str, ranks: Any) -> None:
    expected = train_naively(name, BLOCKS, workers=2, base=adam)
    assert_both(ranks, f"adam {name}", expected, 1e-10)


@pytest.mark.parametrize("name", [*OWN, "optimistic", "noise", "extragradient"])
def test_a_loop_that_averages_by_itself(name: str, ranks: Any) -> None:
    assert_both(ranks, f"by itself {name}", train_naively(name, BLOCKS, workers=2))


@pytest.mark.parametrize(
    "name", ["optimistic", "msam", "average of updates", "extragradient", "sam"]
)
def test_directions_of_the_mean_need_not_know_of_ddp(name: str, ranks: Any) -> None:
    expected = train_naively(name, BLOCKS, workers=2, base=base_of(name))
    assert_both(ranks, f"unaware {name}", expected)


@pytest.mark.parametrize("name", OWN)
def test_a_saved_loop_goes_on(name: str, ranks: Any) -> None:
    """The ranks have compared the rest of it bit for bit."""
    expected = train_naively(name, BLOCKS[:1], workers=2)
    for rank in range(2):
        assert_same(ranks[rank][f"resumed {name}"][:1], expected)


@pytest.mark.parametrize("none", [True, False])
@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("name", OWN)
def test_an_update_that_is_left_out(name: str, averaged: bool, none: bool, ranks: Any) -> None:
    """After its average the own gradient before is lost, so nothing is remembered; before it, what
    was is still there.
    """
    expected = train_naively(name, BLOCKS, workers=2, skipped=(2,), forgetting=averaged)
    assert_both(ranks, f"left out {averaged} {none} {name}", expected)


@pytest.mark.parametrize("view", [True, False])
@pytest.mark.parametrize("name", OWN)
def test_a_parameter_that_a_process_does_not_use_has_no_own_gradient(
    name: str, view: bool, ranks: Any
) -> None:
    expected = train_naively(
        name, (1,) * 5, workers=2, model=SomeHeads, loss=loss_of_unused, base=plain_sgd
    )
    assert_both(ranks, f"unused {view} {name}", expected)


@pytest.mark.parametrize("none", [True, False])
@pytest.mark.parametrize("base", ["sgd", "fused"])
@pytest.mark.parametrize("unscaled", ["inside", "after", "by itself"])
@pytest.mark.parametrize("name", ["local", "optimistic"])
def test_a_scaler_whose_overflow_is_forgotten(
    name: str, unscaled: str, base: str, none: bool, ranks: Any
) -> None:
    expected = train_naively(name, BLOCKS, workers=2, skipped=(2,), forgetting=True)
    assert_both(ranks, f"scaled {name} {unscaled} {base} {none}", expected)


@pytest.mark.parametrize("first", ["hook", "extrapolation"])
@pytest.mark.parametrize("hook", ["fp16", "bf16"])
def test_a_compression_hook_may_be_registered_before_or_after(
    hook: str, first: str, ranks: Any
) -> None:
    for rank in range(2):
        case = ranks[rank][f"{hook} {first}"]
        torch.testing.assert_close(case["remembered"], case["own"], rtol=0, atol=1e-14)
    mean = (ranks[0][f"{hook} {first}"]["own"] + ranks[1][f"{hook} {first}"]["own"]) / 2
    error = (ranks[0][f"{hook} {first}"]["gradient"] - mean).norm() / mean.norm()
    assert 1e-6 < error < 1e-2


def test_two_optimizers_of_one_model(ranks: Any) -> None:
    assert_both(ranks, "two optimizers", train_naively("local", BLOCKS, workers=2))


def test_two_models_of_one_optimizer(ranks: Any) -> None:
    assert_both(ranks, "two models", train_naively("local", BLOCKS, workers=2))


def test_a_compiled_model(ranks: Any) -> None:
    assert_both(ranks, "compiled", train_naively("local", BLOCKS, workers=2))


def test_a_ranks_noise_is_that_of_its_worker_in_one_process(ranks: Any) -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    extrapolation = Extrapolation(
        optimizer, GaussianNoise(size=0.1, norm_and_bias=True), workers=2, seed=4
    )
    for update in range(2):
        for rank in range(2):
            with extrapolation.shifted(rank):
                assert torch.equal(flat(net), ranks[rank]["gaussian"][update])
                torch.autograd.backward(loss_of(net, rank, update, 0))
        optimizer.step()
    assert not torch.equal(ranks[0]["gaussian"][0], ranks[1]["gaussian"][0])


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("local without a model", "model="),
        ("local without a model, from a state", "model="),
        ("noise without a model", "model="),
        ("numbered without a model", "model="),
        ("numbered without a model, from a state", "model="),
        ("one worker without a model", "model="),
        ("wrapped later", "model="),
        ("wrapped later, from a state", "model="),
        ("made before the processes", "model="),
        ("not said to be averaged", "averaged()"),
        ("averaged in each block", "no_sync()"),
        ("one model after the other", "no_sync()"),
        ("added to an average", "no_sync()"),
        ("second gradient averaged", "no_sync()"),
        ("second gradient averaged, unaware", "no_sync()"),
        ("never averaged", "no_sync()"),
        ("L-BFGS", "OptimisticGradient"),
        ("model and workers", "workers="),
    ],
)
def test_a_mistake_is_refused_on_every_rank(mistake: str, message: str, ranks: Any) -> None:
    for rank in range(2):
        assert message in str(ranks[rank][mistake])


def test_a_parameter_used_in_an_earlier_micro_batch_alone_is_refused_where_it_is(
    ranks: Any,
) -> None:
    """The other process only sees that this one is gone."""
    assert "micro-batch" in str(ranks[0]["used earlier"])
    assert "RuntimeError" in str(ranks[1]["used earlier"])


@pytest.mark.parametrize("name", OWN)
def test_a_block_that_fails_after_its_average(name: str, ranks: Any) -> None:
    """The own gradient before is lost, so nothing is remembered."""
    expected = train_naively(name, BLOCKS, workers=2, skipped=(2,), forgetting=True)
    assert_both(ranks, f"failed {name}", expected)


@pytest.mark.parametrize("name", [*OWN, "optimistic"])
def test_ddp_of_one_process_is_one_worker(name: str) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for aware in (True, False):
            assert_same(train(name, aware=aware), train_naively(name, BLOCKS))
    finally:
        dist.destroy_process_group()
