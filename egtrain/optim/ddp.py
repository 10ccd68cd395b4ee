"""Extrapolation in a loop with `DistributedDataParallel`: every process is one worker."""

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from egtrain.optim.extrapolation import Extrapolation


def remember_local_gradients(model: nn.Module, extrapolation: Extrapolation) -> None:
    """Make this process one worker, which observes its gradient before the average.

    The worker's number is the rank. After backward(), `.grad` holds the mean over the processes. So
    a communication hook observes each bucket of gradients before its all-reduce, which still
    overlaps with backward(). A direction that uses neither past gradients nor noise is unaffected.

    Args:
        model: the wrapped model; it allows one communication hook. With
            `forward_sync_buffers=False` (`broadcast_buffers=False` in older versions of torch) each
            worker keeps its own BatchNorm statistics, as in `egtrain train`.
        extrapolation: with one worker, over an optimizer of the model's parameters. Call this once
            for each model.

    Raises:
        ValueError: the model is not a DistributedDataParallel or the optimizer's, or there are
            several workers.
        RuntimeError: the model has a communication hook already.
    """
    if not isinstance(model, DistributedDataParallel):
        raise ValueError(
            "remember_local_gradients() takes a DistributedDataParallel, not a "
            f"{type(model).__name__}: "
            "wrap the model first, or leave the line out in a loop of one process"
        )
    # Imported here, since torch may be built without torch.distributed.
    from torch.distributed import GradBucket, get_rank  # type: ignore[attr-defined]
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    averaging = extrapolation.averaging
    if not isinstance(averaging, Averaged):  # a second model's gradients belong to the same block
        averaging = Averaged(extrapolation)
    if averaging.numbers.keys().isdisjoint(model.parameters()):
        raise ValueError(
            "the optimizer has none of the model's parameters: make it from model.parameters()"
        )
    extrapolation.average_with(averaging, get_rank(model.process_group))

    def hook(group: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        # `.grad` of these parameters is still the local one. It is not read from
        # bucket.gradients(), which gives channels_last gradients in the wrong order (torch 2.13).
        averaging.arrive(bucket.parameters())
        return allreduce_hook(group, bucket)

    model.register_comm_hook(model.process_group, hook)


class Averaged:
    """The gradients of one worker that a hook has observed in a block, before the average."""

    def __init__(self, extrapolation: Extrapolation) -> None:
        self.extrapolation = extrapolation
        self.numbers = {p: number for number, p in enumerate(extrapolation.parameters)}
        self.arrivals: Counter[int] = Counter()

    def arrive(self, parameters: Iterable[Tensor]) -> None:
        """Observe the gradients of those parameters that the optimizer trains."""
        numbers = [self.numbers[p] for p in parameters if p in self.numbers]
        self.arrivals.update(numbers)
        self.extrapolation.observe_before_average(numbers)

    def begin_block(self) -> None:
        """Begin a block: no gradient has arrived yet."""
        self.arrivals.clear()

    def end_second_gradient(self) -> None:
        """Raise RuntimeError if the second gradient was averaged."""
        if self.arrivals:
            raise RuntimeError(
                "the second gradient was averaged: take it, forward too, within model.no_sync()"
            )

    def end_block(self) -> Collection[int]:
        """Return the numbers of the parameters whose gradients have arrived.

        Raises:
            RuntimeError: the gradients were not averaged exactly once in the block.
        """
        if not self.arrivals:
            raise RuntimeError(
                "no gradient was averaged in the block: forward and backward belong in it, the "
                "last micro-batch's outside of model.no_sync()"
            )
        if max(self.arrivals.values()) > 1:
            raise RuntimeError(
                "gradients were averaged more than once in the block: take all micro-batches but "
                "the last within model.no_sync(), forward too"
            )
        return self.arrivals
