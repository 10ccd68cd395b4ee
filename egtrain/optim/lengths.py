"""How far an extrapolation goes, relative to the learning rate or the weights, and checks of such
settings.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from egtrain.optim.extrapolation import Point

Scaling = Literal["none", "layer", "filter"]
Precondition = Literal["base", "none"]


@dataclass(frozen=True, kw_only=True)
class Length:
    """How far along a gradient ζ reaches; exactly one of ratio, rate and size.

    Raises:
        ValueError: not exactly one is given, one is negative, or size and scaling do not go
            together.
    """

    ratio: float | None = None
    """ρ: ζ = ρ·γ_t·gradient."""
    rate: float | None = None
    """γ̂: ζ = γ̂·gradient, whatever the learning rate."""
    size: float | None = None
    """s: ‖ζ_l‖ = s·‖x_l‖ for each layer or filter l; goes with `scaling`."""
    scaling: Scaling = "none"
    precondition: Precondition = "base"
    """`base`: along the gradient as the base optimizer scales it, by its trust ratios (LARS, LAMB)
    and second moments (Adam, LAMB). Where a size sets the length, there is no trust ratio in it."""

    def __post_init__(self) -> None:
        require_one_of(Scaling, scaling=self.scaling)
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

    def along(
        self, gradients: list[Tensor], at: Point, factor: Tensor | None = None
    ) -> list[Tensor]:
        """Return ζ along `gradients`, multiplied by `factor` (a scalar tensor) if there is one."""
        lengths = self._lengths(at)
        if factor is not None and (self.size is not None or len(set(lengths)) > 1):
            gradients, factor = list(torch._foreach_mul(gradients, factor)), None
        if self.precondition == "base":
            gradients = at.base.preconditioned(gradients, trust_ratio=self.size is None)
        if self.size is not None:
            return scaled_to_weights(gradients, at.parameters, self.size, self.scaling)
        # One pass over memory where all lengths are the same: on a CPU that is what a shift costs.
        if factor is not None:
            return list(torch._foreach_mul(gradients, factor * lengths[0]))
        return list(torch._foreach_mul(gradients, lengths))

    def _lengths(self, at: Point) -> list[float]:
        """Return what each parameter's gradient is multiplied by, where no size is given."""
        if self.ratio is None:
            return [self.rate or 0.0] * len(at.learning_rates)
        return [self.ratio * rate for rate in at.learning_rates]


def scaled_to_weights(
    zeta: Sequence[Tensor], parameters: Sequence[Tensor], size: float, scaling: Scaling
) -> list[Tensor]:
    """Return ζ_l ← size·‖x_l‖·ζ_l/(‖ζ_l‖ + 1e-6), where l is a layer or a filter, or size·ζ for
    `none`.

    A filter is a slice along dimension 0 of a weight with two or more dimensions; other parameters
    are one filter.
    """
    if scaling == "none":
        return list(torch._foreach_mul(list(zeta), size))
    z_norms, x_norms = (
        layer_or_filter_norms(zeta, scaling),
        layer_or_filter_norms(parameters, scaling),
    )
    # 1e-6 is SmoothOut's: it also keeps a gradient of mere rounding errors from being blown up to
    # full size.
    torch._foreach_add_(z_norms, 1e-6)
    torch._foreach_mul_(x_norms, size)
    # In this order no factor overflows in half precision.
    scaled = list(torch._foreach_div(list(zeta), z_norms))
    torch._foreach_mul_(scaled, x_norms)
    return scaled


def layer_or_filter_norms(tensors: Sequence[Tensor], scaling: Scaling) -> list[Tensor]:
    """Return norms that broadcast against the tensors: of each one, or of its filters."""
    if scaling == "layer":
        return list(torch._foreach_norm(list(tensors)))
    dims = [tuple(range(1, t.ndim)) or None for t in tensors]
    return [
        torch.linalg.vector_norm(t, dim=d, keepdim=True) for t, d in zip(tensors, dims, strict=True)
    ]


def require_sizes(**sizes: float) -> None:
    """Raise ValueError for a size that is negative or not finite."""
    for name, value in sizes.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, not {value}")


def require_one_of(known: object, **choices: str) -> None:
    """Raise ValueError for a choice that is none of the names in a `Literal`."""
    for name, value in choices.items():
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, not {value!r}")
