"""The torch optimizer inside a wrapper, such as Accelerate's."""

from typing import Any

import torch


def unwrapped(optimizer: object) -> torch.optim.Optimizer:
    """Return the optimizer whose step calls hooks: this one, or the one that it wraps.

    A wrapper that does not call `Optimizer.__init__` takes hooks and never calls them, or takes
    none: `AcceleratedOptimizer`, `PostLocalSGDOptimizer`, timm's `Lookahead` and the like. What it
    does to the weights after its optimizer's step is no part of the update that a direction
    observes. `ZeroRedundancyOptimizer` calls its hooks after all processes have all weights, so it
    is returned itself.

    Raises:
        ValueError: no optimizer, several, or one of other parameters is inside; or the optimizer
            makes its updates during the backward pass.
    """
    found = {id(inner): inner for inner in _that_call_hooks(optimizer)}
    name = type(optimizer).__name__
    if len(found) != 1:
        raise ValueError(
            f"{name} calls no step hooks and wraps {len(found) or 'no'} optimizers that do: give "
            "Extrapolation a torch.optim.Optimizer, each one its own"
        )
    (inner,) = found.values()
    # ZeroRedundancyOptimizer has no public name for it.
    if getattr(inner, "_overlap_with_ddp", False):
        raise ValueError(
            f"{type(inner).__name__} with overlap_with_ddp=True makes its updates during the "
            "backward pass, at the shifted weights: set overlap_with_ddp=False"
        )
    if hasattr(optimizer, "param_groups") and _parameters(inner) != _parameters(optimizer):
        raise ValueError(
            f"{name} has other parameters than the {type(inner).__name__} in it: give "
            "Extrapolation the torch.optim.Optimizer of the parameters that are to be shifted"
        )
    return inner


def _that_call_hooks(optimizer: object) -> list[torch.optim.Optimizer]:
    """Return the optimizer itself if its step calls hooks, and else those inside that do."""
    if isinstance(optimizer, torch.optim.Optimizer) and (
        # `Optimizer.__init__` makes both: a step of the class that calls hooks, and the hooks.
        getattr(type(optimizer).step, "hooked", False)
        and "_optimizer_step_pre_hooks" in vars(optimizer)
    ):
        return [optimizer]
    inside = [v for v in vars(optimizer).values() if isinstance(v, torch.optim.Optimizer)]
    return [inner for v in inside for inner in _that_call_hooks(v)]


def _parameters(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
