"""Extrapolation in a loop with `DistributedDataParallel`: every process is one worker."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from egtrain.optim.extrapolation import Extrapolation


def remember_local_gradients(model: nn.Module, extrapolation: Extrapolation) -> None:
    """Make this process one worker, numbered by its rank, that remembers its gradient from before
    the average.

    After backward(), `.grad` holds the mean over the processes. So a communication hook copies each
    bucket of gradients before its all-reduce, which then goes on as without the hook, beside the
    rest of backward(). Past gradients and noise are this worker's own; with a direction that looks
    at neither, the hook changes nothing.

    Args:
        model: after it has been wrapped; it allows one communication hook. With
            `forward_sync_buffers=False` (`broadcast_buffers=False` before torch had that) each
            worker keeps BatchNorm statistics of its own, as in `egtrain train`.
        extrapolation: with one worker, over an optimizer of the model's parameters. Two models, two
            calls.

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
    # Not at the top, so that egtrain.optim can be imported where torch was built without
    # torch.distributed.
    from torch.distributed import GradBucket, get_rank  # type: ignore[attr-defined]
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    def hook(group: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        # `.grad` of these parameters is still the local one. It is not read from
        # bucket.gradients(), which gives channels_last gradients in the wrong order (torch 2.13).
        extrapolation.remember_gradients(bucket.parameters())
        return allreduce_hook(group, bucket)

    extrapolation.take_before_average(model.parameters(), get_rank(model.process_group))
    model.register_comm_hook(model.process_group, hook)
