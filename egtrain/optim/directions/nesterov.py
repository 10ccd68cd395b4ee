"""Nesterov's look-ahead: the step that SGD's momentum alone would make."""

from dataclasses import dataclass

import torch
from torch import Tensor

from egtrain.optim.base_state import require_momentum
from egtrain.optim.direction import Direction, Point


@dataclass(frozen=True, kw_only=True)
class Nesterov(Direction):
    """Nesterov's look-ahead: ζ_t = γ_t·u·v_t with SGD's momentum v_t, factor u (Nesterov 1983).

    With a constant rate and no weight decay, x_t − ζ_t are the weights that
    `torch.optim.SGD(nesterov=True)` keeps. All workers share the shift.
    """

    def check_base(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ValueError unless the base is SGD with momentum and without look-ahead."""
        if not isinstance(optimizer, torch.optim.SGD):
            raise ValueError(
                "Nesterov's look-ahead needs torch.optim.SGD as the base optimizer, not "
                f"{type(optimizer).__name__}"
            )
        require_momentum(optimizer)

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ along the momentum."""
        factors = zip(at.learning_rates, at.base.momentum_factors(), strict=True)
        return list(torch._foreach_mul(at.base.momentum(), [rate * u for rate, u in factors]))
