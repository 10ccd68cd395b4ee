"""Curvature and loss landscapes of any `torch.nn.Module` with a loss function and batches.

`measure` gives a table of numbers. The other functions measure the loss of
`with FrozenLoss.of(model, loss_function, data) as loss:`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from egtrain.sharpness.adaptive import average_sharpness, epsilon_sharpness, worst_sharpness
    from egtrain.sharpness.frozen_loss import FrozenLoss
    from egtrain.sharpness.landscape import (
        between,
        filter_normalised_direction,
        line,
        plane,
        recompute_batchnorm,
    )
    from egtrain.sharpness.own_model import Measurements, measure
    from egtrain.sharpness.spectrum import density, density_on, eigenvalues, trace

__all__ = [
    "FrozenLoss",
    "Measurements",
    "average_sharpness",
    "between",
    "density",
    "density_on",
    "eigenvalues",
    "epsilon_sharpness",
    "filter_normalised_direction",
    "line",
    "measure",
    "plane",
    "recompute_batchnorm",
    "trace",
    "worst_sharpness",
]


def __getattr__(name: str) -> Any:
    # Imported on demand, so that --help does not import torch.
    if name in __all__:
        from egtrain.sharpness import adaptive, frozen_loss, landscape, own_model, spectrum

        for module in (frozen_loss, spectrum, landscape, adaptive, own_model):
            if name in vars(module):
                return vars(module)[name]
    raise AttributeError(f"module 'egtrain.sharpness' has no attribute {name!r}")
