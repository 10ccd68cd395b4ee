"""The optimistic gradient method: along the previous mean gradient."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from egtrain.optim.extrapolation import Need, Point
from egtrain.optim.lengths import Length


@dataclass(frozen=True, kw_only=True)
class OptimisticGradient(Length):
    """Extrapolation from the past: ζ_t = γ̂_t·ḡ_{t−1} (Popov 1980; the optimistic gradient
    method).
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"mean"})

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ along the previous mean gradient."""
        return self.along(at.mean, at)
