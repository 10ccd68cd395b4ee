"""A user's directions, written with `egtrain.optim`: averages of updates and of gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from egtrain.optim import AlongGradient, Direction, Point, State


@dataclass(frozen=True, kw_only=True)
class AverageOfUpdates(Direction):
    """ζ_t = −factor·γ_t/peak_rate·m_t, m_{t+1} = decay·m_t + (1 − decay)·(x_{t+1} − x_t), shared by
    all workers (arXiv 2605.25395).
    """

    factor: float
    decay: float
    peak_rate: float

    def shared_state(self, parameters: list[Tensor]) -> State:
        return {"average_update": [torch.zeros_like(x) for x in parameters]}

    def observe_update(self, state: State, before: list[Tensor], after: list[Tensor]) -> None:
        updates = torch._foreach_sub(after, before)
        torch._foreach_lerp_(state["average_update"], updates, 1 - self.decay)

    def zeta(self, at: Point) -> list[Tensor]:
        return [
            -self.factor * rate / self.peak_rate * average
            for rate, average in zip(at.learning_rates, at.shared["average_update"], strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class AverageOfGradients(AlongGradient):
    """ζ^k_t = ratio·γ_t·a^k_t/(1 − decay^n), a^k_{t+1} = decay·a^k_t + (1 − decay)·g^k_t, where n
    counts the worker's gradients.
    """

    decay: float

    def worker_state(self, parameters: list[Tensor]) -> State:
        return {
            "average": [torch.zeros_like(x) for x in parameters],
            "count": [torch.zeros((), dtype=x.dtype) for x in parameters],
        }

    def observe_gradient(self, state: State, gradients: list[Tensor]) -> None:
        torch._foreach_lerp_(state["average"], gradients, 1 - self.decay)
        torch._foreach_add_(state["count"], 1.0)

    def zeta(self, at: Point) -> list[Tensor]:
        unbiased = [
            average / (1 - self.decay ** count.clamp(min=1))
            for average, count in zip(at.state["average"], at.state["count"], strict=True)
        ]
        return self.along(unbiased, at)
