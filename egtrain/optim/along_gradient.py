"""Directions along a gradient, and how far they go."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from egtrain.optim.base_scales import scale_of
from egtrain.optim.direction import Direction, Point
from egtrain.optim.scaling import Scaling, require_one_of, require_sizes, scaled_to_weights

Preconditioner = Callable[[torch.optim.Optimizer, list[Tensor], list[Tensor]], list[Tensor]]
"""A function of the base optimizer, parameters and gradients that returns, for each gradient, the
step that the optimizer would make of it at rate 1."""

Precondition = Literal["base", "none"]


@dataclass(frozen=True, kw_only=True)
class AlongGradient(Direction):
    """A direction along a gradient; exactly one of ratio, rate and size sets its length.

    Raises:
        ValueError: not exactly one is given, it is negative, or scaling does not fit it; or, for
            the precondition `base`, how the optimizer scales a gradient is not known.
    """

    ratio: float | None = None
    """ρ: ζ = ρ·γ_t·gradient."""
    rate: float | None = None
    """γ̂: ζ = γ̂·gradient, whatever the learning rate."""
    size: float | None = None
    """s: ‖ζ_l‖ = s·‖x_l‖ for each layer or filter l; goes with `scaling`."""
    scaling: Scaling = "none"
    precondition: Precondition | Preconditioner = "base"
    """`base`: scale the gradient as the base optimizer does, by trust ratios (LARS, LAMB), second
    moments (Adam and its kin) and so on; only for optimizers of torch and of this package. With a
    size, factors of whole layers are left out. `none`: leave it as it is. Or a function of (base
    optimizer, parameters, gradients) that returns the scaled gradients."""

    def __post_init__(self) -> None:
        require_one_of(Scaling, scaling=self.scaling)
        if not callable(self.precondition):
            require_one_of(Precondition, precondition=self.precondition)
        given = {
            name: getattr(self, name)
            for name in ("ratio", "rate", "size")
            if getattr(self, name) is not None
        }
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of ratio, rate and size, not {sorted(given) or 'none'}"
            )
        require_sizes(**given)
        if (self.size is not None) != (self.scaling != "none"):
            raise ValueError(
                "size goes with scaling 'layer' or 'filter', ratio and rate with scaling 'none'"
            )

    def check_base(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ValueError if the gradient is to be scaled in a way that is not known."""
        if self.precondition == "base":
            scale_of(optimizer)

    def along(
        self, gradients: list[Tensor], at: Point, factor: Tensor | None = None
    ) -> list[Tensor]:
        """Return ζ along `gradients`, scaled first by `factor` (a scalar tensor) if given."""
        lengths = self._lengths(at)
        equal = len(set(lengths)) == 1
        if factor is not None and (self.size is not None or not equal):
            gradients, factor = list(torch._foreach_mul(gradients, factor)), None
        if callable(self.precondition):
            gradients = self.precondition(at.base.optimizer, at.parameters, list(gradients))
        elif self.precondition == "base":
            gradients = at.base.preconditioned(gradients, of_layers=self.size is None)
        if self.size is not None:
            return scaled_to_weights(gradients, at.parameters, self.size, self.scaling)
        # One pass over memory if all lengths are equal: on a CPU, memory is the cost of a shift.
        if factor is not None:
            return list(torch._foreach_mul(gradients, factor * lengths[0]))
        return list(torch._foreach_mul(gradients, lengths[0] if equal else lengths))

    def _lengths(self, at: Point) -> list[float]:
        """Return the factor of each parameter's gradient if no size is given."""
        if self.ratio is None:
            return [self.rate or 0.0] * len(at.learning_rates)
        return [self.ratio * rate for rate in at.learning_rates]
