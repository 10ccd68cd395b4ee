"""Extrapolation in a loop with Accelerate: its state in `accelerator.save_state`."""

from typing import Any

from egtrain.integrations.states import load_own, save_own
from egtrain.optim import Extrapolation


def save_with(accelerator: Any, extrapolation: Extrapolation) -> None:
    """Let `accelerator.save_state` and `load_state` save and load an extrapolation too.

    Each process has a file of its own; `accelerator.register_for_checkpointing` would save the
    first one's only.

    Args:
        accelerator: an `accelerate.Accelerator`.
        extrapolation: made of the prepared model and optimizer.
    """
    accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: save_own(extrapolation, folder)
    )
    accelerator.register_load_state_pre_hook(lambda models, folder: load_own(extrapolation, folder))
