"""The base optimizer's state that directions use: its momentum, and how it scales a gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from egtrain.optim.base_scales import Lot, scale_of, sgd
from egtrain.optim.real_views import complex_view, real_view


class BaseState:
    """An optimizer's state, for the parameters that are shifted.

    Args:
        optimizer: the base optimizer.
        parameters: the shifted parameters; each list below has one entry for each.
        groups: the number of each parameter's group.
        updates: how many updates were made.
        updated: whether each parameter had a gradient in the last update; by default all.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
        groups: Sequence[int],
        updates: int = 0,
        updated: Sequence[bool] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self._parameters = parameters
        self._groups = groups
        self.updates = updates
        self.updated = [True] * len(parameters) if updated is None else updated

    def momentum(self) -> list[Tensor]:
        """Return v_t: `momentum_buffer` (SGD, LARS), `exp_avg` (Adam, LAMB), or zero at first.

        Raises:
            RuntimeError: the optimizer keeps no momentum of a parameter that it has updated.
        """
        buffers = []
        for i, (p, state) in enumerate(zip(self._parameters, self._states(), strict=True)):
            buffer = state.get("momentum_buffer", state.get("exp_avg"))
            if buffer is None and self._must_have_state(i):
                raise self._no_state("momentum", "use another direction")
            buffers.append(torch.zeros_like(p) if buffer is None else buffer)
        return buffers

    def momentum_factors(self) -> list[float]:
        """Return the momentum factor u of each parameter's group (SGD, LARS)."""
        return [self.optimizer.param_groups[i]["momentum"] for i in self._groups]

    def preconditioned(self, gradients: list[Tensor], *, of_layers: bool = True) -> list[Tensor]:
        """Return gradients as the optimizer scales them, by the formulas in base_scales.py.

        Before the first update of a parameter, the result is zero if the scale is made of
        gradients (Adam), and the gradient itself if it is a factor of the rate (LARS).

        Args:
            gradients: of what is minimised.
            of_layers: whether factors of whole layers are wanted, such as trust ratios.

        Raises:
            ValueError: how the optimizer scales gradients is not known.
            RuntimeError: it keeps no state of a parameter that it has updated.
        """
        scale = scale_of(self.optimizer)
        if scale.scaled is sgd:  # nothing to scale, and no state to look up
            return list(gradients)
        states = self._states()
        found = list(gradients)
        lots: dict[tuple[int, torch.device], list[int]] = {}
        for i, state in enumerate(states):
            if state or scale.at_first == "no state":
                lots.setdefault((self._groups[i], gradients[i].device), []).append(i)
            elif self._must_have_state(i):
                raise self._no_state("state", "give the direction precondition='none'")
            elif scale.at_first == "zero":
                found[i] = torch.zeros_like(gradients[i])
        for (group, _), members in lots.items():
            lot = Lot(
                [real_view(self._parameters[i]) for i in members],
                [real_view(gradients[i]) for i in members],
                [states[i] for i in members],
                self.optimizer.param_groups[group],
                of_layers,
            )
            for i, scaled in zip(members, scale.scaled(lot), strict=True):
                found[i] = complex_view(scaled, gradients[i])
        return found

    def _must_have_state(self, i: int) -> bool:
        return self.updates > 0 and self.updated[i]

    def _no_state(self, what: str, otherwise: str) -> RuntimeError:
        name = type(self.optimizer).__name__
        return RuntimeError(
            f"{name} keeps no {what} of a parameter that it has updated: load its state, or if it "
            f"keeps that elsewhere, {otherwise}"
        )

    def _states(self) -> list[dict[str, Any]]:
        # Not by [], which would add entries.
        return [self.optimizer.state.get(p, {}) for p in self._parameters]


def require_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless every parameter group has heavy-ball momentum without look-ahead."""
    if isinstance(optimizer, torch.optim.NAdam):
        raise ValueError(
            "a shift along the momentum replaces NAdam's look-ahead: use torch.optim.Adam"
        )
    for number, group in enumerate(optimizer.param_groups):
        if group.get("nesterov"):
            raise ValueError(
                "a shift along the momentum replaces Nesterov's look-ahead: set nesterov=False in "
                f"group {number}"
            )
        if not group.get("momentum", group.get("betas", (0.0,))[0]) > 0:
            raise ValueError(
                f"a shift along the momentum needs momentum: set it above 0 in group {number}"
            )
