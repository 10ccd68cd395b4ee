"""What the workers report of a step besides their gradients, and how it reaches the host."""

import math
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from egtrain.errors import DivergedError

T = TypeVar("T")


class Reported(NamedTuple, Generic[T]):
    """A number of each worker: tensors [workers] on the device, lists on the host."""

    loss: T
    metric: T
    squared_gradient_norm: T
    """Before clipping."""
    relative_shift: T
    """‖ζ‖/‖x‖ of worker 0 only."""
    gradient_alignment: T
    """The cosine between the gradient and the previous one, of worker 0 only."""
    stop: T
    """Above zero if a rank was asked to stop, at the index of its first worker."""


def read_reported(values: list[float]) -> tuple[Reported[list[float]], float]:
    """Return what the workers reported of a step and the squared norm of their mean gradient."""
    *rows, squared_norm_of_mean = values
    workers = len(rows) // len(Reported._fields)
    starts = range(0, len(rows), workers)
    return Reported(*(rows[start : start + workers] for start in starts)), squared_norm_of_mean


def require_finite(reported: Reported[list[float]], squared_norm_of_mean: float, step: int) -> None:
    """Raise DivergedError, naming the worker, if a loss or gradient was not finite."""
    # The first step's weights are the initial ones, whatever the rate.
    first = "look at the model, the data and the loss, since no update was made yet"
    for worker, loss in enumerate(reported.loss):
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss of worker {worker} became {loss} at step {step}: "
                + (first if step == 1 else "lower optimizer.lr or lengthen the warm-up")
            )
    squared_norms = {
        f" of worker {k}": norm for k, norm in enumerate(reported.squared_gradient_norm)
    }
    for whose, norm in {**squared_norms, "": squared_norm_of_mean}.items():
        if not math.isfinite(norm):
            raise DivergedError(
                f"the gradient{whose} became {norm} at step {step}: "
                + (first if step == 1 else "lower optimizer.lr")
            )


class HostCopy:
    """A copy of a tensor on the host, made while the device goes on."""

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.is_cuda:
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> list[float]:
        """Wait for the values and return them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[float] = self._tensor.double().tolist()
        return values
