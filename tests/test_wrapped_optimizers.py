"""An optimizer in a wrapper is found in it, so that its updates are noticed."""

import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from egtrain.optim.wrappers import unwrapped

with warnings.catch_warnings():  # torch.jit.script, which torch itself still uses here
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import PostLocalSGDOptimizer

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
    with pytest.raises(ValueError, match=f"Holder calls no step hooks and wraps {said}.*own"):
        unwrapped(Holder(*inside))


def test_a_wrapper_of_other_parameters_is_refused() -> None:
    wrapper = Lookahead(torch.optim.SGD([one_weight()], lr=0.1))
    wrapper.param_groups = [{"params": [one_weight()]}]
    with pytest.raises(ValueError, match="Lookahead has other parameters than the SGD in it"):
        unwrapped(wrapper)
