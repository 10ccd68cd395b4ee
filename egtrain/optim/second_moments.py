"""Adam's second moments, as a gradient is divided by them."""

import torch
from torch import Tensor


def second_moment_roots(
    moments: list[Tensor], steps: Tensor, *, beta2: float, eps: float
) -> list[Tensor]:
    """Return √v̂ + ε for each second moment v: v̂ = v/(1 − β₂^t).

    Args:
        moments: v of each parameter.
        steps: t of each parameter, float64 [parameters].
        beta2: β₂.
        eps: ε.
    """
    roots = list(torch._foreach_sqrt(moments))
    torch._foreach_div_(roots, factors((1 - beta2**steps).sqrt()))
    torch._foreach_add_(roots, eps)
    return roots


def factors(values: Tensor) -> list[float] | list[Tensor]:
    """Return the entries of a vector, by which the tensors of a list can be multiplied.

    They are numbers if the vector is on the CPU; on another device scalar tensors, for which the
    CPU does not wait.
    """
    return values.tolist() if values.is_cpu else list(values.unbind())
