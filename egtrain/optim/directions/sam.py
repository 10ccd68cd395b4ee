"""Sharpness-aware minimisation: against the normalised gradient at x."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from egtrain.optim.direction import Direction, Point
from egtrain.optim.scaling import require_sizes


@dataclass(frozen=True, kw_only=True)
class SAM(Direction):
    """SAM, per worker: ζ^k_t = −radius·∇f^k(x_t)/‖∇f^k(x_t)‖ (arXiv 2010.01412).

    The norm is that of the whole gradient; if it is zero, so is ζ.
    """

    radius: float

    gradients: ClassVar[int] = 2

    def __post_init__(self) -> None:
        require_sizes(radius=self.radius)

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ, which points downhill: x − ζ lies `radius` uphill."""
        norm = torch.nn.utils.get_total_norm(at.second_gradient)
        factor = torch.where(norm > 0, -self.radius / norm, torch.zeros_like(norm))
        return list(torch._foreach_mul(at.second_gradient, factor))
