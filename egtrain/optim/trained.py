"""The parameters that an optimizer trains, and their gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from egtrain.optim.sharded import is_sharded


class Trained:
    """What an optimizer trains now: those of its parameters that require a gradient.

    Args:
        optimizer: its groups may grow, and its parameters may be frozen and unfrozen.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.parameters: list[Tensor] = []
        self.groups: list[int] = []
        """The number of each parameter's group, since `load_state_dict` replaces the groups."""
        self.refresh()

    def refresh(self, amid_update: bool = False) -> list[int | None] | None:
        """Take up what the optimizer trains now.

        Args:
            amid_update: whether a change has to be refused.

        Returns:
            None if nothing has changed; or, for each parameter, its place before the change, None
            for a new one.

        Raises:
            RuntimeError: there is a change, and it has to be refused.
        """
        now = [
            (i, p)
            for i, group in enumerate(self._optimizer.param_groups)
            for p in group["params"]
            if p.requires_grad
        ]
        before = self.parameters
        if len(now) == len(before) and all(p is q for (_, p), q in zip(now, before, strict=True)):
            return None
        if amid_update:
            raise RuntimeError(
                "parameters were added, frozen or unfrozen between the blocks of one update: do "
                "that after the optimizer's step, or call skip_update() if the update is left out"
            )
        places = {id(p): place for place, p in enumerate(before)}
        self.groups = [i for i, _ in now]
        self.parameters = [p for _, p in now]
        return [places.get(id(p)) for p in self.parameters]

    def has_missed_gradient(self) -> bool:
        """Return whether there is a gradient of a parameter that the last refresh did not find."""
        known = set(map(id, self.parameters))
        return any(
            p.requires_grad and id(p) not in known and p.grad is not None
            for group in self._optimizer.param_groups
            for p in group["params"]
        )

    def names(self) -> list[str] | None:
        """Return the parameters' names, if the optimizer was made from `named_parameters()`."""
        found = {}
        for group in self._optimizer.param_groups:
            if "param_names" not in group:
                return None
            for name, p in zip(group["param_names"], group["params"], strict=True):
                found[id(p)] = name
        return [found[id(p)] for p in self.parameters]

    def learning_rates(self) -> list[float]:
        """Return the learning rate of each parameter's group."""
        rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        return [rates[i] for i in self.groups]

    def gradients(self, numbers: Sequence[int] | None = None) -> list[Tensor]:
        """Return the gradients of what is minimised, zero where there is none.

        They are `.grad` itself, or its negative in a group that maximises.

        Args:
            numbers: the places of the wanted parameters; by default all.

        Raises:
            RuntimeError: one is sparse.
        """
        signs = [-1 if group.get("maximize") else 1 for group in self._optimizer.param_groups]
        found = []
        for i in range(len(self.parameters)) if numbers is None else numbers:
            p = self.parameters[i]
            gradient = p.grad
            if gradient is None:
                # Zeros that take no memory; a DTensor's would lose how it is sharded.
                found.append(torch.zeros_like(p) if is_sharded(p) else p.new_zeros(()).expand_as(p))
                continue
            if gradient.layout != torch.strided:
                raise RuntimeError(
                    "extrapolation needs dense gradients: use sparse=False in embeddings"
                )
            found.append(gradient if signs[self.groups[i]] > 0 else -gradient)
        return found

    def gradients_of_update(self) -> list[Tensor]:
        """Return the gradients with which the optimizer is about to make its update."""
        gradients = self.gradients()
        scale, overflow = self.scaling()
        if scale is not None:
            gradients = list(torch._foreach_div(gradients, scale))
        if overflow is not None:
            gradients = [torch.where(overflow > 0, 0.0, g) for g in gradients]
        return gradients

    def scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """Return what `torch.amp.GradScaler` leaves to a fused optimizer: the scale of the
        gradients, and whether one has overflowed, in which case there is no update.
        """
        values: list[Any] = [getattr(self._optimizer, n, None) for n in ("grad_scale", "found_inf")]
        scale, overflow = (
            None if v is None else torch.as_tensor(v, device=self.parameters[0].device)
            for v in values
        )
        return scale, overflow

    def norm(self) -> Tensor:
        """Return the norm of all gradients together, a scalar on the device of the first."""
        return total_norm([p.grad for p in self.parameters if p.grad is not None])


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Return the norm of all tensors together."""
    return torch.nn.utils.get_total_norm(tensors)
