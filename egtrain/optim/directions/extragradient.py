"""The stochastic extragradient method: along a second gradient, taken at x."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from egtrain.optim.extrapolation import Need, Point
from egtrain.optim.lengths import Length


@dataclass(frozen=True, kw_only=True)
class Extragradient(Length):
    """The stochastic extragradient method: ζ^k_t = γ̂_t·∇f^k(x_t; ξ') (Korpelevich 1976).

    Whether ξ' are the samples of the step or new ones is for the function that computes the
    gradient to choose.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"fresh"})

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ along the gradient at the unshifted weights."""
        return self.along(at.fresh, at)
