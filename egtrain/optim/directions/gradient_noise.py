"""Gradient noise: along the worker's previous gradient minus the mean gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from egtrain.optim.along_gradient import AlongGradient
from egtrain.optim.direction import Point, State


@dataclass(frozen=True, kw_only=True)
class GradientNoise(AlongGradient):
    """The worker's gradient noise: ζ^k_t = γ̂_t·(g^k_{t−1} − ḡ_{t−1}).

    After Haruki et al., arXiv 1906.10822.
    """

    def worker_state(self, parameters: list[Tensor]) -> State:
        """Return zero gradients."""
        return {"gradient": [torch.zeros_like(x) for x in parameters]}

    def shared_state(self, parameters: list[Tensor]) -> State:
        """Return zero gradients."""
        return {"mean_gradient": [torch.zeros_like(x) for x in parameters]}

    def observe_gradient(self, state: State, gradients: list[Tensor]) -> None:
        """Keep g^k_t."""
        torch._foreach_copy_(state["gradient"], gradients)

    def observe_mean_gradient(self, state: State, gradients: list[Tensor]) -> None:
        """Keep ḡ_t."""
        torch._foreach_copy_(state["mean_gradient"], gradients)

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ along the difference of the worker's gradient from the mean."""
        past = at.state["gradient"]
        if at.clip_factor is not None:
            past = list(torch._foreach_mul(past, at.clip_factor))
        return self.along(list(torch._foreach_sub(past, at.shared["mean_gradient"])), at)
