"""The torch optimizer inside a wrapper, such as Accelerate's, and its updates."""

import sys
from collections.abc import Callable
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
            f"{name} calls no step hooks and wraps {len(found) or 'no'} optimizers that do: make "
            "one Extrapolation for each torch.optim.Optimizer"
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


def watch_updates(
    optimizer: torch.optim.Optimizer, before: Callable[..., Any], after: Callable[..., Any]
) -> int:
    """Call two hooks before and after each of the optimizer's steps.

    In a step that calls the step of its parent class, torch may call the hooks of both. Here the
    outer ones count.

    Returns:
        The number of the hook before steps.
    """
    pre_hook = optimizer.register_step_pre_hook(
        lambda *args: None if _in_a_step() else before(*args)
    )
    optimizer.register_step_post_hook(lambda *args: None if _in_a_step() else after(*args))
    return pre_hook.id


def _in_a_step() -> bool:
    """Return whether a step within the same optimizer's step has called the hook of this call."""
    step = sys._getframe(2)  # torch's function around the optimizer's
    frame = step.f_back
    while frame is not None:
        if frame.f_code is step.f_code and frame.f_locals.get("self") is step.f_locals.get("self"):
            return True
        frame = frame.f_back
    return False


def _that_call_hooks(optimizer: object) -> list[torch.optim.Optimizer]:
    """Return the optimizer itself if its step calls hooks, and else those inside that do."""
    # `Optimizer.__init__` marks the step of a class when it makes it call hooks.
    if isinstance(optimizer, torch.optim.Optimizer) and hasattr(type(optimizer).step, "hooked"):
        return [optimizer]
    inside = [
        v
        for v in getattr(optimizer, "__dict__", {}).values()
        if isinstance(v, torch.optim.Optimizer)
    ]
    return [inner for v in inside for inner in _that_call_hooks(v)]


def _parameters(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
