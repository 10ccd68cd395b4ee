"""An optimizer in a wrapper is found in it, so that its updates are noticed."""

import re
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import on_two_ranks, process_group
from own_directions import AverageOfUpdates
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from egtrain.optim import (
    Direction,
    Extrapolation,
    GaussianNoise,
    LocalGradient,
    OptimisticGradient,
    Point,
    State,
)
from egtrain.optim.wrappers import unwrapped, watch_updates

with warnings.catch_warnings():  # torch.jit.script, which torch itself still uses here
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

Optimizer = torch.optim.Optimizer


class Lookahead(Optimizer):
    """Slow weights, as in timm: it has hooks, and its step does not call them."""

    def __init__(self, base_optimizer: Optimizer, alpha: float = 0.5, k: int = 2) -> None:
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._base_optimizer = base_optimizer
        self.param_groups = base_optimizer.param_groups
        self.defaults = base_optimizer.defaults
        self.state = defaultdict(dict)
        self.alpha, self.k, self.count = alpha, k, 0
        self.slow = [p.detach().clone() for p in base_optimizer.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self._base_optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                p.copy_(slow.lerp_(p, self.alpha))
        return loss

    def state_dict(self) -> dict[str, Any]:
        return self._base_optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._base_optimizer.load_state_dict(state)
        self.param_groups = self._base_optimizer.param_groups


class NoAverages:
    step = 0

    def average_parameters(self, params: Any) -> None:
        pass


class Holder:
    """A wrapper that is no optimizer at all."""

    def __init__(self, *optimizers: Optimizer) -> None:
        for number, optimizer in enumerate(optimizers):
            setattr(self, f"_optimizer_{number}", optimizer)

    def step(self) -> None:
        for optimizer in vars(self).values():
            optimizer.step()


def accelerated(optimizer: Optimizer) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


def of_lightning(optimizer: Optimizer) -> Any:
    return pytest.importorskip("pytorch_lightning.core.optimizer").LightningOptimizer(optimizer)


WRAPPERS: dict[str, Callable[[Optimizer], Any]] = {
    "Accelerate": accelerated,
    "Lightning": of_lightning,
    "PostLocalSGDOptimizer": lambda o: PostLocalSGDOptimizer(o, NoAverages()),
    "timm's Lookahead": Lookahead,
    "Lookahead in Accelerate": lambda o: accelerated(Lookahead(o)),
    "no optimizer": Holder,
}


def one_weight() -> nn.Parameter:
    return nn.Parameter(torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_optimizer_whose_hooks_are_called_is_found(name: str) -> None:
    w = one_weight()
    optimizer = torch.optim.SGD([w], lr=0.1)
    wrapper = WRAPPERS[name](optimizer)
    found = unwrapped(wrapper)
    assert found is optimizer
    if name == "Lightning":  # its step goes through a trainer
        return
    calls = []
    found.register_step_pre_hook(lambda *_: calls.append("before"))
    found.register_step_post_hook(lambda *_: calls.append("after"))
    w.grad = torch.ones_like(w)
    wrapper.step()
    assert calls == ["before", "after"]


def test_an_optimizer_is_itself() -> None:
    optimizer = torch.optim.SGD([one_weight()], lr=0.1)
    assert unwrapped(optimizer) is optimizer
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # puts another function in place of step
    assert unwrapped(optimizer) is optimizer


def test_a_wrapper_that_calls_its_own_hooks_stays() -> None:
    class Averaged(Optimizer):
        def __init__(self, inner: Optimizer) -> None:
            super().__init__(inner.param_groups, inner.defaults)
            self.inner = inner

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    wrapper = Averaged(torch.optim.SGD([one_weight()], lr=0.1))
    assert unwrapped(wrapper) is wrapper


@pytest.mark.parametrize(("count", "said"), [(0, "no optimizers"), (2, "2 optimizers")])
def test_a_wrapper_of_none_or_several_is_refused(count: int, said: str) -> None:
    inside = [torch.optim.SGD([one_weight()], lr=0.1) for _ in range(count)]
    with pytest.raises(
        ValueError, match=f"Holder calls no step hooks and wraps {said}.*one Extrapolation for each"
    ):
        unwrapped(Holder(*inside))


def test_a_wrapper_of_other_parameters_is_refused() -> None:
    wrapper = Lookahead(torch.optim.SGD([one_weight()], lr=0.1))
    wrapper.param_groups = [{"params": [one_weight()]}]
    with pytest.raises(ValueError, match="Lookahead has other parameters than the SGD in it"):
        unwrapped(wrapper)


# ---- in a loop

Step = Callable[[], object]


def weights(
    w: nn.Parameter, extrapolation: Extrapolation, step: Step, target: float = 0.0
) -> list[float]:
    """Return w after each update on (w − target)⁴/4."""
    found = []
    for _ in range(4):
        with extrapolation.shifted():
            w.grad = None
            torch.autograd.backward((w - target) ** 4 / 4)
        step()
        found.append(w.item())
    return found


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "Lightning"])
def test_a_wrapped_optimizer_is_extrapolated_as_itself(name: str) -> None:
    """EXTRAP-SGD on w⁴/4, and timm's slow weights every second step, written out."""
    w = one_weight()
    wrapper = WRAPPERS[name](torch.optim.SGD([w], lr=0.1))
    found = weights(w, Extrapolation(wrapper, LocalGradient(ratio=0.5)), wrapper.step)
    x, gradient, slow, expected = 1.0, 0.0, 1.0, []
    for step in range(4):
        gradient = (x - 0.05 * gradient) ** 3
        x -= 0.1 * gradient
        if "Lookahead" in name and step % 2:
            x = slow = (slow + x) / 2
        expected.append(x)
    assert found == pytest.approx(expected, abs=1e-15)


class Counted(Direction):
    """ζ = 0.01·(the updates that were observed)."""

    def shared_state(self, parameters: list[Tensor]) -> State:
        return {"updates": [torch.zeros_like(x) for x in parameters]}

    def observe_update(self, state: State, before: list[Tensor], after: list[Tensor]) -> None:
        torch._foreach_add_(state["updates"], 1.0)

    def zeta(self, at: Point) -> list[Tensor]:
        return [0.01 * n for n in at.shared["updates"]]


def test_a_step_that_calls_its_parents_step_is_one_update() -> None:
    """Torch calls the hooks in both."""

    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    torch.optim.SGD([one_weight()], lr=0.1)  # from here on SGD.step calls hooks
    w = one_weight()
    optimizer = Twice([w], lr=0.1)
    extrapolation = Extrapolation(optimizer, Counted())
    expected, x = [], 1.0
    for step in range(4):
        x -= 0.1 * (x - 0.01 * step) ** 3
        expected.append(x)
    assert weights(w, extrapolation, optimizer.step) == pytest.approx(expected, abs=1e-15)
    assert extrapolation.steps == 4


def test_a_step_that_failed_does_not_hide_the_next() -> None:
    class Failing(torch.optim.SGD):
        fails = True

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise MemoryError
            return super().step(closure)

    calls: list[str] = []
    optimizer = Failing([one_weight()], lr=0.1)
    watch_updates(optimizer, lambda *_: calls.append("before"), lambda *_: calls.append("after"))
    with pytest.raises(MemoryError):
        optimizer.step()
    optimizer.fails = False
    optimizer.step()
    assert calls == ["before", "before", "after"]


# ---- in two processes


def zero(parameters: Any, **options: Any) -> Any:
    return ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=0.1, momentum=0.5, **options)


def plain(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


def train_with_ddp(make: Callable[[Any], Optimizer], direction: Direction) -> list[Tensor]:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model = DistributedDataParallel(network)
    optimizer = make(model.parameters())
    extrapolation = Extrapolation(optimizer, direction, model=model)
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        inputs = torch.randn(4, 3, dtype=torch.float64, generator=generator)
        with extrapolation.shifted():
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in network.parameters()]


def train_apart() -> list[float]:
    """Return w after each update on (w − rank)⁴/4, averaged over the ranks every second time."""
    w = one_weight()
    averager = PeriodicModelAverager(period=2, warmup_steps=1)
    optimizer = PostLocalSGDOptimizer(torch.optim.SGD([w], lr=0.1), averager)
    extrapolation = Extrapolation(optimizer, LocalGradient(ratio=0.5), workers=1)
    return weights(w, extrapolation, optimizer.step, target=dist.get_rank())


def in_two_processes() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with process_group():
        for name, direction in DIRECTIONS.items():
            found[name] = train_with_ddp(zero, direction), train_with_ddp(plain, direction)
        found["apart"] = train_apart()
        overlapping = zero([one_weight(), one_weight()], overlap_with_ddp=True)
        try:
            unwrapped(overlapping)
        except ValueError as error:
            found["overlapping"] = str(error)
    return found


DIRECTIONS: dict[str, Direction] = {
    "local": LocalGradient(ratio=0.5, precondition="none"),
    "optimistic": OptimisticGradient(ratio=0.5, precondition="none"),
    "noise": GaussianNoise(size=0.1),
    "updates": AverageOfUpdates(factor=0.5, decay=0.7, peak_rate=0.1),
}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(in_two_processes, tmp_path_factory.mktemp("wrapped"))


@pytest.mark.parametrize("name", DIRECTIONS)
def test_an_optimizer_of_shared_state_is_extrapolated_as_the_whole(
    name: str, on_ranks: list[dict[str, Any]]
) -> None:
    for found in on_ranks:
        for a, b in zip(*found[name], strict=True):
            assert torch.equal(a, b)


def test_weights_that_are_averaged_after_the_step_are_shifted_from_the_average(
    on_ranks: list[dict[str, Any]],
) -> None:
    x, gradient, expected = [1.0, 1.0], [0.0, 0.0], []
    for step in range(4):
        for rank in range(2):
            gradient[rank] = (x[rank] - 0.05 * gradient[rank] - rank) ** 3
            x[rank] -= 0.1 * gradient[rank]
        if step % 2:
            x = [sum(x) / 2] * 2
        expected.append(tuple(x))
    for rank, found in enumerate(on_ranks):
        assert found["apart"] == pytest.approx([x[rank] for x in expected], abs=1e-15)


def test_updates_during_the_backward_pass_are_refused(on_ranks: list[dict[str, Any]]) -> None:
    for found in on_ranks:
        assert re.search("at the shifted weights: set overlap_with_ddp=False", found["overlapping"])
