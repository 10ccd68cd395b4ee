"""EXTRAP-SGD: along the worker's previous gradient."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from egtrain.optim.extrapolation import Need, Point
from egtrain.optim.lengths import Length


@dataclass(frozen=True, kw_only=True)
class LocalGradient(Length):
    """EXTRAP-SGD: ζ^k_t = γ̂_t·g^k_{t−1}, the worker's previous gradient (arXiv 2006.05720)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"own"})

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ along the worker's previous gradient."""
        return self.along(at.own, at, at.clip_factor)
