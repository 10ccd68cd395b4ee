"""Flat vectors of all weights, and the numbers that are made of them."""

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from egtrain.errors import DivergedError
from egtrain.optim.randomness import generator_for


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors as one flat vector, on the device of the first; sparse ones as dense."""
    device = tensors[0].device
    with torch.no_grad():
        return torch.cat([_dense(t).reshape(-1).to(device) for t in tensors])


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor


def longest_type(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the type that holds the numbers of all tensors."""
    return reduce(torch.promote_types, (t.dtype for t in tensors))


def splitter(tensors: Sequence[Tensor]) -> Callable[[Tensor], list[Tensor]]:
    """Return a function that splits a flat vector into tensors of these shapes and types.

    It keeps no tensor.
    """
    kinds = [(t.shape, t.device, t.dtype) for t in tensors]
    longest = longest_type(tensors)

    def split(vector: Tensor) -> list[Tensor]:
        vector = vector.to(kinds[0][1], longest)  # in one copy, not one a piece
        parts = vector.split_with_sizes([shape.numel() for shape, _, _ in kinds])
        return [
            part.view(shape).to(device, dtype)
            for part, (shape, device, dtype) in zip(parts, kinds, strict=True)
        ]

    return split


def gaussian_vector(size: int, seed: int, purpose: str, *index: int) -> Tensor:
    """Return N(0, 1) numbers [size], float64, drawn on the CPU: the same for every device."""
    return torch.randn(size, generator=generator_for(seed, purpose, *index), dtype=torch.float64)


def mean_and_standard_error(samples: Sequence[float]) -> tuple[float, float]:
    """Return the mean of independent samples and its standard error; nan for a single sample."""
    values = torch.tensor(samples, dtype=torch.float64)
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), error


def require_finite(value: float) -> float:
    """Return a number computed from the loss, if it is finite.

    Raises:
        DivergedError: it is infinite or not a number.
    """
    if not math.isfinite(value):
        raise DivergedError(
            "the loss or its curvature is not a finite number at these weights: measure an "
            "earlier checkpoint"
        )
    return value
