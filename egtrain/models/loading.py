"""Loading saved weights into a model, with the mismatch named where they do not fit."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from egtrain.errors import UsageError


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy parameters and buffers by name.

    `nn.Module.load_state_dict` is not used because it asks for BatchNorm counters that our networks
    do without.

    Raises:
        UsageError: a name is missing or unknown, or a shape differs.
    """
    own = model.state_dict()
    for name in [*own, *tensors]:
        if name not in tensors or name not in own:
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
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
