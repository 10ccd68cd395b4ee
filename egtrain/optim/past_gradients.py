"""Directions made of gradients that training has computed anyway: one gradient a step."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from egtrain.optim.extrapolation import Need, Point
from egtrain.optim.lengths import Length


@dataclass(frozen=True, kw_only=True)
class LocalGradient(Length):
    """EXTRAP-SGD: ζ^k_t = γ̂_t·g^k_{t−1}, the worker's own previous gradient (arXiv 2006.05720)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"own"})

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ along the worker's previous gradient."""
        return self.along(at.own, at, at.clip_factor)


@dataclass(frozen=True, kw_only=True)
class GlobalGradient(Length):
    """Extrapolation from the past: ζ_t = γ̂_t·ḡ_{t−1} (Popov 1980; the optimistic gradient
    method).
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"mean"})

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ along the previous mean gradient."""
        return self.along(at.mean, at)


@dataclass(frozen=True, kw_only=True)
class GradientNoise(Length):
    """The worker's own gradient noise: ζ^k_t = γ̂_t·(g^k_{t−1} − ḡ_{t−1}), after Haruki et al.
    (arXiv 1906.10822).
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"own", "mean"})

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ along the difference of the worker's gradient from the mean."""
        own = at.own if at.clip_factor is None else list(torch._foreach_mul(at.own, at.clip_factor))
        return self.along(list(torch._foreach_sub(own, at.mean)), at)
