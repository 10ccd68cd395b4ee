"""Sharded parameters (FSDP2): two processes with shards are one process with the whole."""

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from helpers import on_two_ranks, process_group
from own_directions import AverageOfGradients, AverageOfUpdates
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from egtrain.optim import (
    LAMB,
    LARS,
    MSAM,
    SAM,
    AlongGradient,
    Direction,
    Extragradient,
    Extrapolation,
    GaussianNoise,
    GradientNoise,
    LocalGradient,
    Nesterov,
    OptimisticGradient,
    Point,
    SmoothOut,
    State,
)

pytestmark = pytest.mark.timeout(180)
Shard = Callable[[nn.Module], object]
Weights = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class AverageOfMeans(AlongGradient):
    """A user's: along an average of mean gradients."""

    def shared_state(self, parameters: Weights) -> State:
        return {"average": [torch.zeros_like(x) for x in parameters]}

    def observe_mean_gradient(self, state: State, gradients: Weights) -> None:
        torch._foreach_lerp_(state["average"], gradients, 0.3)

    def zeta(self, at: Point) -> Weights:
        return self.along(at.shared["average"], at)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "lars": lambda p: LARS(p, lr=0.3, weight_decay=0.01, trust_coefficient=0.1),
    "lamb": lambda p: LAMB(p, lr=0.02, weight_decay=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.05),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.05),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    # torch's Muon itself takes no matrix of one row that is sharded.
    "muon": lambda p: torch.optim.Muon([x for x in p if x.ndim == 2 and len(x) > 1], lr=0.05),
}
DIRECTIONS: dict[str, Direction] = {
    "optimistic": OptimisticGradient(ratio=0.5),
    "optimistic by layer": OptimisticGradient(size=0.1, scaling="layer"),
    "optimistic by filter": OptimisticGradient(size=0.1, scaling="filter"),
    "msam": MSAM(radius=0.1),
    "nesterov": Nesterov(),
    "gaussian": GaussianNoise(size=0.1),
    "gaussian of all": GaussianNoise(size=0.1, norm_and_bias=True),
    "smoothout by layer": SmoothOut(size=0.1, scaling="layer", norm_and_bias=True),
    "average of updates": AverageOfUpdates(factor=0.5, decay=0.7, peak_rate=0.3),
    "average of means": AverageOfMeans(ratio=0.5),
    "extragradient": Extragradient(ratio=0.5),
    "sam": SAM(radius=0.05),
}
ROWS = [
    *(("sgd", name) for name in DIRECTIONS),
    *(
        (optimizer, name)
        for optimizer in ("adam", "lars", "lamb")
        for name in ("optimistic by layer", "msam", "gaussian", "sam")
    ),
    *((optimizer, "optimistic") for optimizer in OPTIMIZERS if optimizer != "sgd"),
]


def network() -> nn.Sequential:
    """Return a network of which two processes have shards of unequal size, and empty ones."""
    torch.manual_seed(7)
    layers = [nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 1)]
    return nn.Sequential(*layers).double()


def batch(step: int, parts: int) -> tuple[Tensor, Tensor]:
    """Return this process's part of the 8 samples of a step."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    targets = torch.randn(8, 1, generator=generator, dtype=torch.float64)
    number = dist.get_rank() if parts > 1 else 0
    return inputs.chunk(parts)[number], targets.chunk(parts)[number]


def by_layer(model: nn.Module, **options: Any) -> None:
    """Shard the first layer by itself, and the rest with the root."""
    for module in (model.get_submodule("0"), model):
        fully_shard(module, **options)


class Loop:
    """A training loop, in one process or of two, which have half of the samples each."""

    def __init__(
        self,
        shard: Shard | None,
        optimizer: str = "sgd",
        direction: str = "optimistic",
        parts: int = 2,
    ) -> None:
        self.sharded = shard is not None
        self.parts = parts if shard is not None else 1
        self.model: Any = network()
        if shard is not None:
            shard(self.model)
        self.parameters = list(self.model.parameters())
        self.optimizer = OPTIMIZERS[optimizer](self.parameters)
        chosen = DIRECTIONS[direction]
        self.extrapolation = Extrapolation(
            self.optimizer,
            chosen,
            workers=1 if chosen.gradients == 2 else None,
            model=self.model if shard is not None else None,
        )

    def backward(self, step: int) -> None:
        self.optimizer.zero_grad()
        self.add_gradient(*batch(step, self.parts))

    def add_gradient(self, inputs: Tensor, targets: Tensor, parts: int = 1) -> None:
        loss = (self.model(inputs) - targets).square().mean() / parts
        torch.autograd.backward(loss)

    def step(self, step: int) -> None:
        with self.extrapolation.shifted(gradient=lambda: self.backward(step)):
            self.backward(step)
        self.optimizer.step()

    def run(self, steps: int = 4, first: int = 0) -> Weights:
        for step in range(first, steps):
            self.step(step)
        return self.weights()

    def weights(self) -> Weights:
        return [
            p.full_tensor() if self.sharded else p.detach().clone()  # type: ignore[attr-defined]
            for p in self.parameters
        ]


class Evaluated(Loop):
    """After a pass without backward FSDP2 keeps what it gathered, shifted or not."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.outputs: list[Tensor] = []

    def evaluate(self) -> None:
        with torch.no_grad():
            self.outputs.append(self.model(batch(0, 1)[0]))

    def step(self, step: int) -> None:
        self.evaluate()
        with self.extrapolation.shifted():
            self.evaluate()
            self.backward(step)
            self.evaluate()
        self.optimizer.step()

    def weights(self) -> Weights:
        return super().weights() + self.outputs


class Failing(Evaluated):
    """A forward pass fails in a block; the loop goes on."""

    def step(self, step: int) -> None:
        handle = self.model[2].register_forward_pre_hook(run_out_of_memory)
        with contextlib.suppress(MemoryError), self.extrapolation.shifted():
            self.backward(step)
        handle.remove()
        super().step(step)


def run_out_of_memory(*_: object) -> None:
    raise MemoryError


class Gathered(Loop):
    """The weights are gathered early, as FSDP2's documentation shows."""

    def step(self, step: int) -> None:
        if self.sharded:
            self.model.unshard()
        super().step(step)


class GatheredInBackground(Loop):
    def step(self, step: int) -> None:
        if self.sharded:
            self.model.unshard(async_op=True)
        super().step(step)


class MicroBatches(Loop):
    """Gradients are reduced, and the weights dropped, after the last micro-batch only."""

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        inputs, targets = batch(step, self.parts)
        with self.extrapolation.shifted():
            for i in range(2):
                if self.sharded:
                    self.model.set_requires_gradient_sync(i == 1)
                    self.model.set_reshard_after_backward(i == 1)
                self.add_gradient(inputs[i::2], targets[i::2], parts=2)
        self.optimizer.step()


class TwoBlocks(Loop):
    """Two blocks are one update; what the first gathered is kept."""

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        inputs, targets = batch(step, self.parts)
        for i in range(2):
            if self.sharded:
                self.model.set_reshard_after_backward(False)
            with self.extrapolation.shifted():
                self.add_gradient(inputs[i::2], targets[i::2], parts=2)
        self.optimizer.step()


class Clipped(Loop):
    def step(self, step: int) -> None:
        with self.extrapolation.shifted():
            self.backward(step)
        nn.utils.clip_grad_norm_(self.parameters, 0.1)
        self.optimizer.step()


class PartlyUnused(Loop):
    """The last layer gets no gradient."""

    def __init__(self, shard: Shard | None) -> None:
        super().__init__(shard, direction="average of means")
        self.model[-1].forward = lambda x: x.sum(1, keepdim=True)


LOOPS: dict[str, type[Loop]] = {
    "evaluated": Evaluated,
    "failing": Failing,
    "gathered": Gathered,
    "gathered in background": GatheredInBackground,
    "micro-batches": MicroBatches,
    "two blocks": TwoBlocks,
    "clipped": Clipped,
    "partly unused": PartlyUnused,
}
ON_MESHES = {
    "replicas of shards": ("lars", "optimistic by layer"),
    "replicas": ("lars", "gaussian"),
    "tensor parallel": ("sgd", "optimistic"),
    "kept after forward": ("sgd", "msam"),
}


def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])


def tensor_parallel(model: nn.Module) -> None:
    """Shard two layers over one dimension of a mesh, and all over the other."""
    mesh = mesh_of(1, 2)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, mesh["b"], plan)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh["a"])


def shard_on(name: str) -> Shard:
    shards: dict[str, Shard] = {
        "replicas of shards": lambda m: by_layer(m, mesh=mesh_of(1, 2)),
        "replicas": lambda m: by_layer(m, mesh=mesh_of(2, 1)),
        "tensor parallel": tensor_parallel,
        "kept after forward": lambda m: by_layer(m, reshard_after_forward=False),
    }
    return shards[name]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def message(function: Callable[[], object]) -> str:
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


class Whole(Direction):
    """A direction whose ζ is not made from the parameters."""

    def zeta(self, at: Point) -> Weights:
        return [torch.ones(x.shape, dtype=x.dtype) for x in at.parameters]


class Own(OptimisticGradient):
    def worker_state(self, parameters: Weights) -> State:
        return {"own": [torch.zeros_like(x) for x in parameters]}


def refusals() -> dict[str, str]:
    """Return what is said of loops that would not be right."""
    loop = Loop(by_layer)
    model, optimizer = loop.model, loop.optimizer
    optimistic = DIRECTIONS["optimistic"]
    found = {
        name: message(lambda d=direction: Extrapolation(optimizer, d, model=model))
        for name, direction in {
            "local": LocalGradient(ratio=0.5),
            "gradient noise": GradientNoise(ratio=0.5),
            "average of gradients": AverageOfGradients(ratio=0.5, decay=0.6),
            "sam": SAM(radius=0.05),
            "extragradient": Extragradient(ratio=0.5),
        }.items()
    }
    found["two workers"] = message(lambda: Extrapolation(optimizer, optimistic, 2, model=model))
    found["no model"] = message(lambda: Extrapolation(optimizer, optimistic))
    found["another model"] = message(
        lambda: Extrapolation(optimizer, optimistic, model=Loop(by_layer).model)
    )
    mixed = OPTIMIZERS["sgd"]([*loop.parameters, nn.Parameter(torch.ones(()))])
    found["whole parameters too"] = message(lambda: Extrapolation(mixed, optimistic, model=model))
    loop.extrapolation = Extrapolation(optimizer, Whole(), model=model)
    found["a whole shift"] = message(loop.run)
    found["sharded afterwards"] = message(shard_after_the_extrapolation)
    found["loaded in the block"] = message(load_in_the_block)
    found["not reduced"] = message(take_second_gradient_without_reduction)
    for flat in (True, False):
        first = FullyShardedDataParallel(
            network(), use_orig_params=not flat, device_id=torch.device("cpu")
        )
        of_first = OPTIMIZERS["sgd"](first.parameters())
        found[f"FSDP1, {flat}"] = message(
            lambda o=of_first, m=first: Extrapolation(o, optimistic, model=m)
        )
    return found


def shard_after_the_extrapolation() -> None:
    """As Accelerate's `prepare` puts shards in place of the optimizer's parameters."""
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    extrapolation = Extrapolation(optimizer, DIRECTIONS["optimistic"])
    fully_shard(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with extrapolation.shifted():
        pass


def load_in_the_block() -> None:
    loop = Loop(by_layer)
    state = {name: t.clone() for name, t in loop.model.state_dict().items()}
    with loop.extrapolation.shifted():
        loop.backward(0)
        loop.model.load_state_dict(state)


def take_second_gradient_without_reduction() -> None:
    loop = Loop(by_layer, direction="sam")

    def second() -> None:
        loop.model.set_requires_gradient_sync(False)
        loop.backward(0)
        loop.model.set_requires_gradient_sync(True)

    with loop.extrapolation.shifted(gradient=second):
        pass


def resumed_after(
    change_over: Callable[[Loop, Loop], object], optimizer: str, direction: str
) -> Weights:
    """Return the weights of a loop that goes on after two steps where another one was saved."""
    first, second = (Loop(by_layer, optimizer, direction) for _ in range(2))
    first.run(2)
    change_over(first, second)
    return second.run(4, first=2)


def save_on_each_process(first: Loop, second: Loop) -> None:
    file = io.BytesIO()
    parts = ("model", "optimizer", "extrapolation")
    torch.save([getattr(first, name).state_dict() for name in parts], file)
    file.seek(0)
    for name, state in zip(parts, torch.load(file), strict=True):
        getattr(second, name).load_state_dict(state)


def save_together(folder: Path) -> Callable[[Loop, Loop], None]:
    def state_of(loop: Loop) -> dict[str, Any]:
        model, optimizer = get_state_dict(loop.model, loop.optimizer)
        extrapolation = loop.extrapolation.state_dict()
        return {"model": model, "optimizer": optimizer, "extrapolation": extrapolation}

    def save(first: Loop, second: Loop) -> None:
        checkpoint.save(state_of(first), checkpoint_id=folder)
        state = state_of(second)
        checkpoint.load(state, checkpoint_id=folder)
        set_state_dict(
            second.model,
            second.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        second.extrapolation.load_state_dict(state["extrapolation"])

    return save


def gathering_after_the_optimizer_only() -> bool:
    """Return whether the pass in a block would wait for an event of before its shift."""
    loop = Loop(by_layer)
    loop.run(1)
    loop.model.set_post_optim_event("the optimizer's")
    with loop.extrapolation.shifted():
        waits = loop.model._get_fsdp_state()._state_ctx.post_optim_event is not None
        loop.backward(1)
    return waits


def all_on_this_rank(folder: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    with process_group(), quiet():
        for row in ROWS:
            found[row] = Loop(by_layer, *row).run()
        for name, kind in LOOPS.items():
            found[name] = kind(by_layer).run()
        for name, row in ON_MESHES.items():
            # The processes of tensor parallelism have the same samples.
            parts = 1 if name == "tensor parallel" else 2
            found[name] = Loop(shard_on(name), *row, parts=parts).run()
        found["saved on each process"] = resumed_after(save_on_each_process, "adam", "optimistic")
        found["saved together"] = resumed_after(save_together(folder), "adam", "optimistic")
        found["waits for the optimizer only"] = gathering_after_the_optimizer_only()
        found["refusals"] = refusals()
    return found


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    return on_two_ranks(functools.partial(all_on_this_rank, folder / "together"), folder)


@functools.cache
def alone(kind: type[Loop], *row: str) -> Weights:
    return kind(None, *row).run()


def unshifted(kind: type[Loop], *row: str) -> Weights:
    loop = kind(None, *row)
    loop.extrapolation = Extrapolation(loop.optimizer, OptimisticGradient(rate=0.0))
    return loop.run()


def require_equal(on_ranks: list[dict[Any, Any]], name: Any, kind: type[Loop], *row: str) -> None:
    """Both processes have one process's weights, to which the shift matters."""
    expected = alone(kind, *row)
    assert not all(
        torch.allclose(a, b, rtol=0, atol=1e-5)
        for a, b in zip(expected, unshifted(kind, *row), strict=True)
    )
    for found in on_ranks:
        for a, b in zip(found[name], expected, strict=True):
            # Muon computes in bfloat16.
            torch.testing.assert_close(a, b, rtol=0, atol=1e-2 if "muon" in row else 1e-13)


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_shards_are_shifted_as_the_whole(row: tuple[str, str], on_ranks: Any) -> None:
    require_equal(on_ranks, row, Loop, *row)


@pytest.mark.parametrize("name", LOOPS)
def test_the_gradient_is_taken_at_the_shifted_weights(name: str, on_ranks: Any) -> None:
    require_equal(on_ranks, name, LOOPS[name])


@pytest.mark.parametrize("name", ON_MESHES)
def test_any_mesh_gives_the_same(name: str, on_ranks: Any) -> None:
    require_equal(on_ranks, name, Loop, *ON_MESHES[name])


@pytest.mark.parametrize("name", ["saved on each process", "saved together"])
def test_a_saved_loop_goes_on_as_if_undisturbed(name: str, on_ranks: Any) -> None:
    require_equal(on_ranks, name, Loop, "adam", "optimistic")


def test_weights_are_not_gathered_before_they_are_shifted(on_ranks: Any) -> None:
    assert not any(found["waits for the optimizer only"] for found in on_ranks)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("local", "LocalGradient needs each worker's own gradient.*take OptimisticGradient"),
        ("gradient noise", "GradientNoise needs each worker's own gradient"),
        ("average of gradients", "AverageOfGradients needs each worker's own gradient"),
        ("sam", "second gradient.*is the mean over the processes.*pass workers=1"),
        ("extragradient", "second gradient.*is the mean over the processes.*pass workers=1"),
        ("two workers", "are one worker: leave out workers=2"),
        ("no model", r"pass Extrapolation\(..., model=model\)"),
        ("another model", r"pass Extrapolation\(..., model=model\)"),
        ("whole parameters too", "an optimizer and an Extrapolation for each kind"),
        ("sharded afterwards", r"pass Extrapolation\(..., model=model\)"),
        ("loaded in the block", r"the weights were changed in the shifted\(\) block"),
        ("not reduced", r"no parameter has a gradient after gradient\(\)"),
        ("a whole shift", "make it from the parameter, as torch.zeros_like does"),
        ("FSDP1, True", "fully_shard instead"),
        ("FSDP1, False", "fully_shard instead"),
    ],
)
def test_what_would_be_something_else_is_refused(name: str, said: str, on_ranks: Any) -> None:

    for found in on_ranks:
        assert re.search(said, found["refusals"][name]), found["refusals"][name]
