"""What a user gives as a loss, as one function from (model, batch) to the loss and a metric."""

from collections.abc import Callable, Sequence
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
    innermost: Any = loss_function
    while isinstance(innermost, partial):
        innermost = innermost.func
    return (
        isinstance(innermost, nn.Module)
        or getattr(innermost, "__module__", "") == nn.functional.__name__
    )


def require_mean_over_samples(loss_function: LossFunction, batches: Sequence[Any]) -> None:
    """Refuse several batches in which a loss of torch averages over something else than samples.

    The mean of their means would depend on how the samples lie in batches.

    Raises:
        UsageError: classes have weights, targets are ignored, or have several lengths.
    """
    if len(batches) < 2 or not is_of_torch(loss_function):
        return
    ignored = _setting(loss_function, "ignore_index", -100)
    targets = [b[1] for b in batches if isinstance(b, tuple | list) and len(b) == 2]
    labels = [t for t in targets if isinstance(t, Tensor) and not t.is_floating_point()]
    if _setting(loss_function, "weight", None) is not None:
        reason = "the classes have weights"
    elif any(bool((t == ignored).any()) for t in labels):
        reason = f"some targets are {ignored} and so ignored"
    elif len({t.shape[1:] for t in targets if isinstance(t, Tensor)}) > 1:
        reason = "targets have several lengths"
    else:
        return
    raise UsageError(
        f"{reason}, so the loss is no mean over samples: give all data as one batch, or how many "
        "targets count in each, FrozenLoss(model, loss_function, [(batch, count), ...])"
    )


def _setting(loss_function: LossFunction, name: str, default: Any) -> Any:
    """Return a setting of a loss: a keyword of a partial, or else what its module holds."""
    while isinstance(loss_function, partial):
        if name in loss_function.keywords:
            return loss_function.keywords[name]
        loss_function = loss_function.func
    return getattr(loss_function, name, default)


def _require_mean(loss_function: LossFunction) -> None:
    reduction = _setting(loss_function, "reduction", "mean")
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
