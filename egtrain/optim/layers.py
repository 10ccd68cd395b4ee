"""What LARS and LAMB share: which layers are updated together, and which adapt and decay."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from egtrain.optim.real_views import real_view


@dataclass(frozen=True)
class Layers:
    """Layers of one group that are treated alike, with their gradients."""

    parameters: list[Tensor]
    weights: list[Tensor]
    """The parameters, or views of complex ones as pairs of real numbers."""
    gradients: list[Tensor]
    """Likewise."""
    adapted: bool
    """Whether they have trust ratios."""
    weight_decay: float


def layers_treated_alike(name: str, group: dict[str, Any]) -> Iterator[Layers]:
    """Yield the layers of a group that have a gradient, in lots that are treated alike.

    Raises:
        RuntimeError: a gradient is sparse.
    """
    lists: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for p in group["params"]:
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided:
            raise RuntimeError(f"{name} needs dense gradients: use sparse=False in embeddings")
        lists.setdefault((p.device, p.dtype, p.ndim > 1), []).append(p)
    for (_, _, matrices), parameters in lists.items():
        yield Layers(
            parameters,
            [real_view(p) for p in parameters],
            [real_view(p.grad) for p in parameters if p.grad is not None],
            adapted=matrices or group["adapt_norm_and_bias"],
            weight_decay=group["weight_decay"] if matrices or group["decay_norm_and_bias"] else 0.0,
        )


def update_layers(
    optimizer: torch.optim.Optimizer,
    closure: Callable[[], Any] | None,
    update: Callable[[Layers, dict[str, Any]], None],
) -> Any:
    """Update the layers of all groups, and return the closure's loss.

    Raises:
        RuntimeError: a gradient is sparse, or there is none at all.
    """
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    lots = [
        (layers, group)
        for group in optimizer.param_groups
        for layers in layers_treated_alike(type(optimizer).__name__, group)
    ]
    # A group without a gradient is legal: a head of another task, a layer that was dropped.
    if not lots and any(p.requires_grad for g in optimizer.param_groups for p in g["params"]):
        raise RuntimeError("no parameter has a gradient: call backward() before step()")
    for layers, group in lots:
        update(layers, group)
    return loss


def norms(tensors: list[Tensor]) -> Tensor:
    """Return the Euclidean norm of each tensor, as one vector."""
    return torch.stack(list(torch._foreach_norm(tensors)))


def check_setting(fulfilled: bool, what: str, value: object) -> None:
    """Raise ValueError, with the value, unless a setting is in its range."""
    if not fulfilled:
        raise ValueError(f"{what}, not {value}")
