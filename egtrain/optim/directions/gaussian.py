"""Gaussian smoothing: independent normal noise in each worker and step."""

from dataclasses import dataclass

from torch import Tensor

from egtrain.optim.direction import Point
from egtrain.optim.noise import Noise


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Noise):
    """Isotropic smoothing: ζ^k_t = size·n with independent n ~ N(0, 1), scaled to the weights."""

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ, normal noise drawn for the worker and the step."""
        generator = at.generator()
        return self.scaled(lambda n: n.normal_(generator=generator), at)
