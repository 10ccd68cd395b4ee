"""EXTRAP-SGD: along the worker's previous gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from egtrain.optim.along_gradient import AlongGradient
from egtrain.optim.direction import Point, State


@dataclass(frozen=True, kw_only=True)
class LocalGradient(AlongGradient):
    """EXTRAP-SGD: ζ^k_t = γ̂_t·g^k_{t−1}, the worker's previous gradient (arXiv 2006.05720)."""

    def worker_state(self, parameters: list[Tensor]) -> State:
        """Return zero gradients."""
        return {"gradient": [torch.zeros_like(x) for x in parameters]}

    def observe_gradient(self, state: State, gradients: list[Tensor]) -> None:
        """Keep g^k_t."""
        torch._foreach_copy_(state["gradient"], gradients)

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ along the worker's previous gradient."""
        return self.along(at.state["gradient"], at, at.clip_factor)
