"""The second gradient of directions such as SAM, by one more forward and backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from egtrain.optim import Direction


@contextmanager
def nothing_else_changes(model: nn.Module) -> Iterator[None]:
    """Put back the random states and the model's buffers, such as BatchNorm statistics."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    cuda = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def refuse_scaled(direction: Direction, scaler: Any) -> None:
    """Raise ValueError if a second gradient would be one of a scaled loss."""
    if scaler is not None and direction.gradients == 2:
        raise ValueError(
            "the second gradient would be that of the loss as GradScaler has scaled it: train in "
            "bfloat16, which needs no scaling"
        )
