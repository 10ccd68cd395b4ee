"""Loading saved weights into a model, with the mismatch named where they do not fit."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from egtrain.errors import UsageError


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy parameters and buffers by name; BatchNorm's counters of batches may be missing on either
    side, as they are in training.

    Raises:
        UsageError: a name is missing or unknown, or a shape differs.
    """
    own = model.state_dict()
    for name in [*own, *tensors]:
        if name not in tensors or name not in own:
            if name.rpartition(".")[2] == "num_batches_tracked":
                continue
            where = "checkpoint" if name in own else "model"
            raise UsageError(
                f"the checkpoint is of another architecture: the {where} has no '{name}'"
            )
        if own[name].shape != tensors[name].shape:
            raise UsageError(
                f"the checkpoint is of another architecture: '{name}' has shape "
                f"{list(tensors[name].shape)}, "
                f"and the model's {list(own[name].shape)}"
            )
    with torch.no_grad():
        for name in own.keys() & tensors.keys():
            own[name].copy_(tensors[name])
