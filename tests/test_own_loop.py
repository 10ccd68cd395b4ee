"""`egtrain.optim` in a user's loop: alone, with DDP, and step by step like `egtrain train`."""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import on_two_ranks, process_group, torch_as_it_was
from own_directions import AverageOfGradients, AverageOfUpdates
from test_docs import DDP, SECOND_GRADIENT
from tiny_run import train_watched
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from egtrain.build import build_direction, build_model, build_run, load_data
from egtrain.config.files import load_config
from egtrain.data.images import ImageData
from egtrain.optim import (
    SAM,
    Direction,
    Extragradient,
    Extrapolation,
    GaussianNoise,
    GradientNoise,
    LocalGradient,
    OptimisticGradient,
    ddp,
)
from egtrain.workers import Ranks

pytestmark = pytest.mark.timeout(180)
Batch = tuple[Tensor, Tensor]
Trajectory = list[Tensor]
"""The weights after each update, in one vector."""

DIRECTIONS: dict[str, Direction] = {
    "local": LocalGradient(ratio=0.5),
    "optimistic": OptimisticGradient(ratio=0.5),
    "gradient-noise": GradientNoise(ratio=0.5),
    "extragradient": Extragradient(ratio=0.5),
    "sam": SAM(radius=0.05),
    "gaussian": GaussianNoise(size=0.05),
    "average of updates": AverageOfUpdates(factor=0.5, decay=0.7, peak_rate=0.5),
    "average of gradients": AverageOfGradients(ratio=0.5, decay=0.6),
}


def small_network() -> nn.Module:
    """Return a network in float64 whose convolution is laid out as channels_last."""
    torch.manual_seed(7)
    layers = [
        nn.Conv2d(2, 3, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 8),
        nn.Tanh(),
        nn.Linear(8, 3),
    ]
    network: nn.Module = nn.Sequential(*layers).double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def micro_batches(worker: int, step: int, count: int) -> list[Batch]:
    """Return a worker's 8 samples of a step in so many parts of equal size."""
    generator = torch.Generator().manual_seed(100 * step + worker)
    images = torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64)
    targets = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return list(zip(images.chunk(count), targets.chunk(count), strict=True))


def loss_function(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def flat(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9, nesterov=True)


def train_alone(
    direction: Direction,
    *,
    workers: int = 1,
    parts: int = 1,
    clip: float | None = None,
    steps: int = 5,
) -> Trajectory:
    """Train the small network in one process."""
    network = small_network()
    optimizer = make_optimizer(network)
    extrapolation = Extrapolation(optimizer, direction, workers)
    found = []

    def backward(worker: int, step: int) -> None:
        optimizer.zero_grad()
        for inputs, targets in micro_batches(worker, step, parts):
            torch.autograd.backward(loss_function(network(inputs), targets) / parts)

    for step in range(steps):
        gradients = []
        for worker in range(workers):
            again = functools.partial(backward, worker, step)
            with extrapolation.shifted(worker, gradient=again):
                backward(worker, step)
            gradients.append([p.grad for p in network.parameters() if p.grad is not None])
        for p, *own in zip(network.parameters(), *gradients, strict=True):
            p.grad = torch.stack(own).mean(dim=0)
        if clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        found.append(flat(network))
    return found


def train_with_ddp(
    direction: Direction,
    *,
    parts: int = 1,
    clip: float | None = None,
    steps: int = 5,
    looks_again: bool = False,
    **options: Any,
) -> Trajectory:
    """Train the small network on this rank and the others.

    It may look at the network's outputs between the forward and the backward pass.
    """
    model = DistributedDataParallel(small_network(), **options)
    optimizer = make_optimizer(model)
    extrapolation = Extrapolation(optimizer, direction, model=model)
    found = []

    def second_gradient() -> None:
        optimizer.zero_grad()
        with model.no_sync():
            for inputs, targets in batches:
                torch.autograd.backward(loss_function(model(inputs), targets) / parts)

    for step in range(steps):
        batches = micro_batches(dist.get_rank(), step, parts)
        with extrapolation.shifted(gradient=second_gradient):
            optimizer.zero_grad()
            for i, (inputs, targets) in enumerate(batches):
                with model.no_sync() if i + 1 < parts else contextlib.nullcontext():
                    loss = loss_function(model(inputs), targets) / parts
                    if looks_again:
                        with torch.no_grad():
                            model(inputs)
                    torch.autograd.backward(loss)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        found.append(flat(model))
    return found


def assert_equal_steps(found: Trajectory, expected: Trajectory, tolerance: float = 1e-12) -> None:
    assert len(found) == len(expected) > 0
    for step, (weights, others) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(
            weights, others, rtol=0, atol=tolerance, msg=lambda text, step=step: f"{step}: {text}"
        )


# The same run by egtrain and by loops of one's own.

SETTINGS = [
    "data.name=synthetic",
    "data.train_samples=160",
    "workers=2",
    "worker_batch_size=8",
    "steps=20",
    "model.depth=8",
    "model.width=4",
    "optimizer.lr=0.1",
    "optimizer.base_batch_size=null",
    "optimizer.momentum=0.9",
    "optimizer.weight_decay=0",
    "schedule.warmup_epochs=0",
    "schedule.decay=constant",
    "precision=fp32",
    "threads=1",
    "device=cpu",
]
"""The library page's optimizer, in a run of 20 steps."""

ZETAS = {
    "local": ["extrapolation.ratio=1/K"],
    "gradient-noise": ["extrapolation.ratio=1/K"],
    "gaussian": ["extrapolation.size=0.05"],
    "extragradient": ["extrapolation.ratio=1/K"],
}


@functools.cache
def images() -> ImageData:
    return load_data(load_config("quickstart", SETTINGS))


class SameRun:
    """A run of egtrain, and its network, batches and direction for another loop."""

    def __init__(self, name: str) -> None:
        config = load_config("quickstart", [*SETTINGS, f"extrapolation.name={name}", *ZETAS[name]])
        self.run = build_run(config, Ranks(), images())
        self.network = build_model(config, images().classes, torch.device("cpu"))
        direction = build_direction(config)
        assert direction is not None
        self.direction = direction

    def batches(self, worker: int) -> Iterator[Batch]:
        return (self.run.task.batch(worker, step) for step in range(self.run.steps))


def egtrains_steps(name: str) -> tuple[Trajectory, list[float]]:
    """Return the weights and mean losses of each step of an `egtrain` run with two workers."""
    run = SameRun(name).run
    weights, losses = [], []

    def note(step: int, metrics: dict[str, float]) -> None:
        weights.append(flat(run.model))
        losses.append(metrics["loss"])

    train_watched(run, note)
    return weights, losses


def steps_of_a_plain_loop(name: str) -> tuple[Trajectory, list[float]]:
    """Return the same of a loop in one process that takes the two workers' gradients one after the
    other.
    """
    same = SameRun(name)
    network = same.network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    extrapolation = Extrapolation(optimizer, same.direction, workers=2)
    weights, losses = [], []

    def backward(inputs: Tensor, targets: Tensor) -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(inputs), targets)
        torch.autograd.backward(loss)
        return loss.item()

    for batches in zip(same.batches(0), same.batches(1), strict=True):
        gradients, total = [], 0.0
        for worker, batch in enumerate(batches):
            with extrapolation.shifted(worker, gradient=functools.partial(backward, *batch)):
                total += backward(*batch)
            gradients.append([p.grad for p in network.parameters() if p.grad is not None])
        for p, *own in zip(network.parameters(), *gradients, strict=True):
            p.grad = torch.stack(own).mean(dim=0)
        optimizer.step()
        weights.append(flat(network))
        losses.append(total / 2)
    return weights, losses


KEPT: list[object] = []
"""What must not be destroyed before the process ends."""


def steps_of_the_page(name: str) -> tuple[Trajectory, list[float]]:
    """Return the weights and this rank's losses of the page's example with DDP, on egtrain's
    network and batches.
    """
    program, given = re.subn(r"^(network|batches) = .*\n", "", DDP, flags=re.MULTILINE)
    program, ends = re.subn(r"^dist.destroy_process_group\(\)\n", "", program, flags=re.MULTILINE)
    program, directions = re.subn(r"LocalGradient\(ratio=1 / world\)", "direction", program)
    assert (given, ends, directions) == (2, 1, 1)
    if name == "extragradient":
        program = SECOND_GRADIENT + program.replace(
            "shifted()", "shifted(gradient=second_gradient)"
        )
    same = SameRun(name)
    weights, losses = [], []

    def noted_batches() -> Iterator[Batch]:
        for batch in same.batches(int(os.environ["RANK"])):
            yield batch
            weights.append(flat(same.network))
            losses.append(names["loss"].item())

    names = {"network": same.network, "batches": noted_batches(), "direction": same.direction}
    KEPT.append(names)  # see process_group
    exec(compile(program, "docs/library.md", "exec"), names)
    return weights, losses


@pytest.mark.parametrize("name", ZETAS)
def test_egtrain_a_plain_loop_and_the_page_with_ddp_make_the_same_steps(
    name: str, tmp_path: Path
) -> None:
    pages_steps = on_two_ranks(functools.partial(steps_of_the_page, name), tmp_path)
    with torch_as_it_was():
        weights, losses = egtrains_steps(name)
        plain_weights, plain_losses = steps_of_a_plain_loop(name)
    # In float32. They were equal bit for bit where this was written, but the engine lays its
    # weights flat, and a kernel may sum in another order where the memory is aligned otherwise.
    # Another ζ makes a difference of 1e-3.
    assert len(weights) == 20
    assert_equal_steps(plain_weights, weights, tolerance=1e-6)
    assert plain_losses == pytest.approx(losses, abs=1e-6)
    for rank in range(2):
        assert_equal_steps(pages_steps[rank][0], weights, tolerance=1e-6)
    pairs = zip(pages_steps[0][1], pages_steps[1][1], strict=True)
    assert [(a + b) / 2 for a, b in pairs] == pytest.approx(losses, abs=1e-6)


# DistributedDataParallel, in all its forms.

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "a bucket for each parameter": {"bucket_cap_mb": 1e-5},
    "views, a bucket for each": {"bucket_cap_mb": 1e-5, "gradient_as_bucket_view": True},
    "looking for unused": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
    "forward once more": {"looks_again": True},
}


def ddp_in_all_forms() -> dict[str, Trajectory]:
    found = {}
    with process_group():
        for form, options in FORMS.items():
            found[form] = train_with_ddp(DIRECTIONS["gradient-noise"], **options)
        for name, direction in DIRECTIONS.items():
            for view in (False, True):
                parts = 4 if not view else 2
                found[f"{name} {view}"] = train_with_ddp(
                    direction, parts=parts, clip=0.3, gradient_as_bucket_view=view
                )
        found |= wrong_loops()
    return found


@pytest.fixture(scope="module")
def ddp_steps(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(ddp_in_all_forms, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("form", FORMS)
def test_ddp_is_two_workers_in_one_process(form: str, ddp_steps: Any) -> None:
    expected = train_alone(DIRECTIONS["gradient-noise"], workers=2)
    for rank in range(2):
        assert_equal_steps(ddp_steps[rank][form], expected)


@pytest.mark.parametrize("view", [False, True], ids=["gradients", "views"])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_ddp_accumulates_and_clips_as_one_process_does_with_whole_batches(
    name: str, view: bool, ddp_steps: Any
) -> None:
    expected = train_alone(DIRECTIONS[name], workers=2, clip=0.3)
    assert not torch.allclose(expected[0], train_alone(DIRECTIONS[name], workers=2)[0])
    for rank in range(2):
        assert_equal_steps(ddp_steps[rank][f"{name} {view}"], expected)


# What goes around the block.


@pytest.mark.parametrize("name", DIRECTIONS)
def test_micro_batches_in_one_block_are_the_whole_batch(name: str) -> None:
    assert_equal_steps(train_alone(DIRECTIONS[name], parts=4), train_alone(DIRECTIONS[name]))


def test_clipping_is_that_of_the_formula() -> None:
    network, limit, rate, ratio = small_network(), 0.3, 0.5, 0.5
    momentum = [torch.zeros_like(p) for p in network.parameters()]
    past = [torch.zeros_like(p) for p in network.parameters()]
    factors, expected = [], []
    for step in range(5):
        x = [p.detach().clone() for p in network.parameters()]
        with torch.no_grad():
            for p, g in zip(network.parameters(), past, strict=True):
                p.sub_(ratio * rate * g)
        ((inputs, targets),) = micro_batches(0, step, 1)
        gradients = torch.autograd.grad(
            loss_function(network(inputs), targets), list(network.parameters())
        )
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        factors.append(min(1.0, limit / (norm + 1e-6)))
        past = [factors[-1] * g for g in gradients]
        momentum = [0.9 * v + g for v, g in zip(momentum, past, strict=True)]
        with torch.no_grad():
            for p, start, g, v in zip(network.parameters(), x, past, momentum, strict=True):
                p.copy_(start - rate * (g + 0.9 * v))
        expected.append(flat(network))

    assert min(factors) < 0.9
    assert_equal_steps(train_alone(LocalGradient(ratio=ratio), clip=limit), expected)


def test_the_shift_follows_a_scheduler() -> None:
    network = small_network()
    optimizer = make_optimizer(network)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=0.5))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.5, total_steps=6, cycle_momentum=False
    )
    past = torch.zeros_like(flat(network))
    rates = set()
    for step in range(5):
        (rate,) = scheduler.get_last_lr()
        rates.add(rate)
        before = flat(network)
        with extrapolation.shifted():
            torch.testing.assert_close(
                before - flat(network), 0.5 * rate * past, rtol=1e-9, atol=1e-12
            )
            optimizer.zero_grad()
            ((inputs, targets),) = micro_batches(0, step, 1)
            torch.autograd.backward(loss_function(network(inputs), targets))
        past = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        optimizer.step()
        scheduler.step()
    assert len(rates) == 5


def test_a_loop_saved_as_in_the_readme_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def loop() -> tuple[nn.Module, torch.optim.Optimizer, Extrapolation]:
        network = small_network()
        optimizer = make_optimizer(network)
        return network, optimizer, Extrapolation(optimizer, LocalGradient(ratio=0.5))

    def train(
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        extrapolation: Extrapolation,
        steps: range,
    ) -> None:
        for step in steps:
            with extrapolation.shifted():
                optimizer.zero_grad()
                ((inputs, targets),) = micro_batches(0, step, 1)
                torch.autograd.backward(loss_function(network(inputs), targets))
            nn.utils.clip_grad_norm_(network.parameters(), 0.3)
            optimizer.step()

    file = tmp_path / "training.pt"
    first, then, whole = loop(), loop(), loop()
    train(*first, range(3))
    network, optimizer, extrapolation = first
    parts = {"network": network, "optimizer": optimizer, "extrapolation": extrapolation}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    state = torch.load(file, weights_only=True)
    for part, saved in zip(then, state.values(), strict=True):
        part.load_state_dict(saved)
    train(*then, range(3, 6))
    train(*whole, range(6))
    assert torch.equal(flat(then[0]), flat(whole[0]))


@pytest.mark.parametrize(
    "outside", [False, True], ids=["autocast in the block", "the block in autocast"]
)
def test_autocast_follows_the_shifts(outside: bool) -> None:
    def train(enabled: bool) -> Trajectory:
        network = small_network().float()
        optimizer = make_optimizer(network)
        extrapolation = Extrapolation(optimizer, LocalGradient(rate=0.5))
        found = []
        for step in range(5):
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=enabled and outside),
                extrapolation.shifted(),
            ):
                optimizer.zero_grad()
                for inputs, targets in micro_batches(0, step, 2):
                    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                        outputs = network(inputs.float())
                    torch.autograd.backward(loss_function(outputs.float(), targets.float()) / 2)
            optimizer.step()
            found.append(flat(network))
        return found

    found, expected = train(True), train(False)
    without = train_alone(LocalGradient(ratio=0))
    assert found[-1].dtype == torch.float32
    error = (found[-1] - expected[-1]).norm()
    assert 0 < error < 0.1 * (found[-1] - without[-1]).norm()


# Mistakes.


def refusal(mistake: Callable[[], object]) -> str:
    """Return the message with which a mistake is refused."""
    with pytest.raises((ValueError, RuntimeError)) as error:
        mistake()
    return f"{error.type.__name__}: {error.value}"


def wrong_loops() -> dict[str, Any]:
    """Return how mistakes with DDP end, on this rank; and what is no mistake."""
    found: dict[str, Any] = {}
    ((inputs, targets),) = micro_batches(dist.get_rank(), 0, 1)

    def loop(
        direction: Direction,
    ) -> tuple[DistributedDataParallel, torch.optim.Optimizer, Extrapolation]:
        model = DistributedDataParallel(small_network())
        optimizer = make_optimizer(model)
        extrapolation = Extrapolation(optimizer, direction, model=model)
        return model, optimizer, extrapolation

    def backward(model: nn.Module) -> None:
        torch.autograd.backward(loss_function(model(inputs), targets))

    def never_averaged() -> None:
        model, optimizer, extrapolation = loop(LocalGradient(ratio=1))
        with extrapolation.shifted(), model.no_sync():
            backward(model)
        optimizer.step()

    def averaged_twice() -> None:
        model, _, extrapolation = loop(LocalGradient(ratio=1))
        with extrapolation.shifted():
            backward(model)
            backward(model)

    def backward_outside() -> None:
        model, optimizer, extrapolation = loop(LocalGradient(ratio=1))
        backward(model)
        optimizer.zero_grad(set_to_none=False)
        with extrapolation.shifted():
            loss = loss_function(model(inputs), targets)
        torch.autograd.backward(loss)

    def backward_outside_at_first() -> None:
        model, _, extrapolation = loop(LocalGradient(ratio=1))
        with extrapolation.shifted():
            loss = loss_function(model(inputs), targets)
        torch.autograd.backward(loss)

    def second_gradient_averaged() -> None:
        model, _, extrapolation = loop(Extragradient(ratio=1))
        with extrapolation.shifted(gradient=lambda: backward(model)):
            backward(model)

    def sparse() -> None:
        network = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
        model = DistributedDataParallel(network)
        extrapolation = Extrapolation(make_optimizer(model), LocalGradient(ratio=1), model=model)
        with extrapolation.shifted():
            torch.autograd.backward(model(torch.tensor([1, 2])).sum())

    def other_parameters() -> None:
        optimizer, model = make_optimizer(small_network()), small_network()
        Extrapolation(optimizer, LocalGradient(ratio=1), model=DistributedDataParallel(model))

    def several_workers() -> None:
        model = DistributedDataParallel(small_network())
        Extrapolation(make_optimizer(model), LocalGradient(ratio=1), workers=2, model=model)

    def rank_for_all() -> None:
        _, _, extrapolation = loop(LocalGradient(ratio=1))
        with extrapolation.shifted(2):
            pass

    for mistake in (
        never_averaged,
        averaged_twice,
        backward_outside,
        backward_outside_at_first,
        second_gradient_averaged,
        sparse,
        other_parameters,
        several_workers,
        rank_for_all,
    ):
        found[mistake.__name__] = refusal(mistake)

    # A step without a block is a plain step, and its gradient is nobody's past.
    model, optimizer, extrapolation = loop(LocalGradient(ratio=1))
    backward(model)
    optimizer.step()
    found["past"] = torch.cat(
        [g.flatten() for g in extrapolation.state_dict()["worker_state"]["gradient"]]
    )
    found["workers"] = list(extrapolation.workers)
    found |= gradients_of_two_models()
    return found


def gradients_of_two_models() -> dict[str, Tensor]:
    """Return what a rank remembers of the gradients of two models after a block."""
    models = [DistributedDataParallel(nn.Linear(1, 1, bias=False)) for _ in range(2)]
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.5)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=1), model=models)
    inputs = torch.full((1, 1), 1.0 + dist.get_rank())
    with extrapolation.shifted():
        torch.autograd.backward(sum(model(inputs).sum() for model in models))
    (rows,) = extrapolation.state_dict()["worker_state"].values()
    return {"two models": torch.cat([row.flatten() for row in rows])}


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            "never_averaged",
            "RuntimeError: no gradient was averaged before the update: take the last micro-batch",
        ),
        (
            "averaged_twice",
            "RuntimeError: gradients were averaged more than once in an update: take all "
            "micro-batches",
        ),
        (
            "backward_outside",
            "RuntimeError: no gradient came in the block: forward and backward belong in it",
        ),
        (
            "backward_outside_at_first",
            "RuntimeError: no parameter has a gradient: backward() belongs inside the block",
        ),
        (
            "second_gradient_averaged",
            "RuntimeError: the second gradient was averaged: take it, forward too, within",
        ),
        (
            "sparse",
            "RuntimeError: extrapolation needs dense gradients: use sparse=False in embeddings",
        ),
        (
            "other_parameters",
            "ValueError: the optimizer has none of the model's parameters: make it from",
        ),
        (
            "several_workers",
            "ValueError: a process of DistributedDataParallel is one worker: leave out workers=",
        ),
        ("rank_for_all", "ValueError: worker 2 is not carried here"),
    ],
)
def test_mistakes_with_ddp_are_refused_on_every_rank(
    mistake: str, message: str, ddp_steps: Any
) -> None:
    for rank in range(2):
        assert ddp_steps[rank][mistake].startswith(message)


def test_a_rank_is_a_worker_and_a_step_without_a_block_is_a_plain_one(ddp_steps: Any) -> None:
    for rank in range(2):
        assert ddp_steps[rank]["workers"] == [rank]
        assert not ddp_steps[rank]["past"].any()


def test_of_two_models_a_rank_remembers_the_gradients_before_the_average(ddp_steps: Any) -> None:
    for rank in range(2):
        assert ddp_steps[rank]["two models"].tolist() == [1 + rank, 1 + rank]


def test_one_of_several_workers_has_to_be_named() -> None:
    extrapolation = Extrapolation(
        make_optimizer(small_network()), LocalGradient(ratio=1), workers=2
    )
    with (
        pytest.raises(ValueError, match=r"say whose gradient it is: shifted\(worker\)"),
        extrapolation.shifted(),
    ):
        pass


def test_the_library_is_imported_where_torch_has_no_distributed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ddp.__file__ is not None
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    exec(
        compile(Path(ddp.__file__).read_text(encoding="utf-8"), ddp.__file__, "exec"),
        {"__name__": "again"},
    )
