"""Shifts in proportion to the weights, by layer or by filter, and checks of such settings."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from egtrain.optim.sharded import norms, summed

Scaling = Literal["none", "layer", "filter"]


def scaled_to_weights(
    zeta: Sequence[Tensor], parameters: Sequence[Tensor], size: float, scaling: Scaling
) -> list[Tensor]:
    """Return size·‖x_l‖·ζ_l/(‖ζ_l‖ + 1e-6) for each layer or filter l; for `none`, size·ζ.

    A filter is a slice along dimension 0 of a weight with two or more dimensions; any other
    parameter is one filter.
    """
    if scaling == "none":
        return list(torch._foreach_mul(list(zeta), size))
    z_norms, x_norms = (
        layer_or_filter_norms(zeta, scaling),
        layer_or_filter_norms(parameters, scaling),
    )
    # 1e-6 is SmoothOut's. It also keeps a gradient of rounding errors from growing to full size.
    torch._foreach_add_(z_norms, 1e-6)
    torch._foreach_mul_(x_norms, size)
    # In this order no factor overflows in half precision.
    scaled = list(torch._foreach_div(list(zeta), z_norms))
    torch._foreach_mul_(scaled, x_norms)
    return scaled


def layer_or_filter_norms(tensors: Sequence[Tensor], scaling: Scaling) -> list[Tensor]:
    """Return the norm of each tensor, or of its filters, in a shape that broadcasts against it."""
    if scaling == "layer":
        return norms(tensors)
    dims = [tuple(range(1, t.ndim)) or None for t in tensors]
    return [
        summed(torch.linalg.vector_norm(t, dim=d, keepdim=True))
        for t, d in zip(tensors, dims, strict=True)
    ]


def require_sizes(**sizes: float) -> None:
    """Raise ValueError for a size that is negative or not finite."""
    for name, value in sizes.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, not {value}")


def require_one_of(known: object, **choices: str) -> None:
    """Raise ValueError for a choice that is not in a `Literal`."""
    for name, value in choices.items():
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, not {value!r}")
