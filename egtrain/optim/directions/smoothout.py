"""SmoothOut: independent uniform noise in each worker and step."""

from dataclasses import dataclass

from torch import Tensor

from egtrain.optim.direction import Point
from egtrain.optim.noise import Noise


@dataclass(frozen=True, kw_only=True)
class SmoothOut(Noise):
    """SmoothOut: ζ^k_t = size·n, n ~ U(−1, 1) independent, scaled to the weights.

    Wen et al. 2018, arXiv 1805.07898.
    """

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ, uniform noise drawn for the worker and the step."""
        generator = at.generator()
        return self.scaled(lambda n: n.uniform_(-1, 1, generator=generator), at)
