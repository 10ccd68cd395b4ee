"""Gradient noise: along the worker's previous gradient less the mean one."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from egtrain.optim.extrapolation import Need, Point
from egtrain.optim.lengths import Length


@dataclass(frozen=True, kw_only=True)
class GradientNoise(Length):
    """The worker's gradient noise: ζ^k_t = γ̂_t·(g^k_{t−1} − ḡ_{t−1}), after Haruki et al. (arXiv
    1906.10822).
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"own", "mean"})

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ along the difference of the worker's gradient from the mean."""
        own = at.own if at.clip_factor is None else list(torch._foreach_mul(at.own, at.clip_factor))
        return self.along(list(torch._foreach_sub(own, at.mean)), at)
