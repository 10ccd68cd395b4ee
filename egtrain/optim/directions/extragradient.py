"""The stochastic extragradient method: along a second gradient, taken at x."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from egtrain.optim.along_gradient import AlongGradient
from egtrain.optim.direction import Point


@dataclass(frozen=True, kw_only=True)
class Extragradient(AlongGradient):
    """The stochastic extragradient method: ζ^k_t = γ̂_t·∇f^k(x_t; ξ') (Korpelevich 1976).

    The function that computes this gradient chooses ξ': the samples of the step, or new ones.
    """

    gradients: ClassVar[int] = 2

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ along the gradient at the unshifted weights."""
        return self.along(at.second_gradient, at)
