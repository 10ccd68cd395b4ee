"""The optimistic gradient method: along the previous mean gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from egtrain.optim.along_gradient import AlongGradient
from egtrain.optim.direction import Point, State
from egtrain.optim.sharded import copy_all


@dataclass(frozen=True, kw_only=True)
class OptimisticGradient(AlongGradient):
    """The optimistic gradient method, or extrapolation from the past: ζ_t = γ̂_t·ḡ_{t−1}.

    Popov 1980.
    """

    def shared_state(self, parameters: list[Tensor]) -> State:
        """Return zero gradients."""
        return {"mean_gradient": [torch.zeros_like(x) for x in parameters]}

    def observe_mean_gradient(self, state: State, gradients: list[Tensor]) -> None:
        """Keep ḡ_t."""
        copy_all(state["mean_gradient"], gradients)

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ along the previous mean gradient."""
        return self.along(at.shared["mean_gradient"], at)
