"""What a user gives as a loss, as one function from (model, batch) to the loss and a metric."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from egtrain.errors import UsageError

LossFunction = Callable[..., Any]
"""Maps (model, batch) to the mean loss with its graph, or to that and the mean of a metric.

Or a loss of torch, such as `nn.CrossEntropyLoss()` or `torch.nn.functional.mse_loss`: it is called
with (model(inputs), targets) for batches (inputs, targets).
"""
Called = Callable[[nn.Module, Any], tuple[Tensor, Tensor | None]]


def called(loss_function: LossFunction) -> Called:
    """Return a function that maps (model, batch) to two scalars: the loss, and a metric or None.

    Raises:
        UsageError: it does not average over the batch; later: its result is not of that kind.
    """
    if is_of_torch(loss_function):
        _require_mean(loss_function)
        return lambda model, batch: _checked(_of_pair(loss_function, model, batch))
    return lambda model, batch: _checked(loss_function(model, batch))


def is_of_torch(loss_function: LossFunction) -> bool:
    """Tell whether a loss compares outputs with targets, as torch's own do."""
    innermost = loss_function.func if isinstance(loss_function, partial) else loss_function
    return (
        isinstance(innermost, nn.Module)
        or getattr(innermost, "__module__", "") == nn.functional.__name__
    )


def _require_mean(loss_function: LossFunction) -> None:
    reduction = getattr(loss_function, "reduction", "mean")
    if isinstance(loss_function, partial):
        reduction = loss_function.keywords.get("reduction", "mean")
    if reduction not in ("mean", "batchmean"):
        raise UsageError(
            f"the loss has reduction={reduction!r}, and the mean over the samples of a batch is "
            "needed: give it reduction='mean'"
        )


def _of_pair(loss_function: LossFunction, model: nn.Module, batch: Any) -> Any:
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise UsageError(
            "a loss of torch needs batches (inputs, targets): for others give a function that maps "
            "(model, batch) to the mean loss"
        )
    inputs, targets = batch
    return loss_function(model(inputs), targets)


def _checked(result: Any) -> tuple[Tensor, Tensor | None]:
    pair = isinstance(result, tuple | list) and len(result) == 2
    loss, metric = result if pair else (result, None)
    if not isinstance(loss, Tensor):
        raise UsageError(
            "the loss function must return the mean loss as a tensor, or (loss, metric), not "
            f"{type(loss).__name__}: return the loss as it is, without .item()"
        )
    for what, number in (("loss", loss), ("metric", metric)):
        if isinstance(number, Tensor) and number.numel() != 1:
            raise UsageError(
                f"the {what} of a batch must be one number, not a tensor of the shape "
                f"{list(number.shape)}: return its mean over the samples"
            )
    if metric is not None:
        metric = torch.as_tensor(metric).detach().reshape(())
    # A view would be differentiated twice, too.
    return loss.reshape(()) if loss.ndim else loss, metric
