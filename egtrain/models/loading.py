"""Loading saved weights into a model; an error names the mismatch."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from egtrain.errors import UsageError


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy parameters and buffers by name; either side may lack BatchNorm's batch counters.

    Raises:
        UsageError: a name is missing or unknown, or a shape differs.
    """
    weights = model.state_dict()
    for name in [*weights, *tensors]:
        if name not in tensors or name not in weights:
            if name.rpartition(".")[2] == "num_batches_tracked":
                continue
            where = "checkpoint" if name in weights else "model"
            raise UsageError(
                f"the checkpoint has another architecture: the {where} has no '{name}'"
            )
        if weights[name].shape != tensors[name].shape:
            raise UsageError(
                f"the checkpoint has another architecture: its '{name}' has shape "
                f"{list(tensors[name].shape)}, the model's {list(weights[name].shape)}"
            )
    with torch.no_grad():
        for name in weights.keys() & tensors.keys():
            weights[name].copy_(tensors[name])
