"""The base optimizer's state that directions use: momentum, second moments, trust ratios."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class BaseState:
    """An optimizer's state, under the names that torch's optimizers use.

    Args:
        optimizer: the base optimizer.
        parameters: the shifted parameters; each list of tensors below has one for each.
        groups: the number of each parameter's group.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], groups: Sequence[int]
    ) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._groups = groups

    def momentum(self) -> list[Tensor]:
        """Return v_t: `momentum_buffer` (SGD, LARS), `exp_avg` (Adam, LAMB), or zero at first."""
        buffers = [state.get("momentum_buffer", state.get("exp_avg")) for state in self._states()]
        return [
            torch.zeros_like(p) if b is None else b
            for b, p in zip(buffers, self._parameters, strict=True)
        ]

    def momentum_factors(self) -> list[float]:
        """Return the momentum factor u of each parameter's group (SGD, LARS)."""
        return [self._optimizer.param_groups[i]["momentum"] for i in self._groups]

    def preconditioned(self, gradients: list[Tensor], *, trust_ratio: bool = True) -> list[Tensor]:
        """Return λ·g/(√v̂ + ε), leaving out a factor that the optimizer does not have.

        λ is the `trust_ratio` of the last update (LARS, LAMB), and 1 before the first. v̂ is the
        bias-corrected `exp_avg_sq` (LAMB, Adam and its variants), or its maximum under amsgrad;
        before the first update there is none, and the result is zero.
        """
        states = self._states()
        gradients = list(gradients)
        if roots := self._second_moment_roots(states):
            divided = torch._foreach_div([gradients[i] for i in roots], list(roots.values()))
            for i, g in zip(roots, divided, strict=True):
                gradients[i] = g
        if trust_ratio and any("trust_ratio" in state for state in states):
            ratios = [
                s.get("trust_ratio", p.new_ones(()))
                for s, p in zip(states, self._parameters, strict=True)
            ]
            # Slow where shapes differ, but the ratios stay on the device.
            gradients = list(torch._foreach_mul(gradients, ratios))
        return gradients

    def _second_moment_roots(self, states: list[dict[str, Any]]) -> dict[int, Tensor]:
        """Return √v̂ + ε, by position, for the parameters with second moments."""
        roots: dict[int, Tensor] = {}
        for number, group in enumerate(self._optimizer.param_groups):
            if not {"betas", "eps"} <= group.keys():
                continue
            members = [i for i, g in enumerate(self._groups) if g == number]
            if known := [i for i in members if "exp_avg_sq" in states[i]]:
                moments = [states[i].get("max_exp_avg_sq", states[i]["exp_avg_sq"]) for i in known]
                steps = [_step_of(states[i], group) for i in known]
                found = second_moment_roots(
                    moments, steps, beta2=group["betas"][1], eps=group["eps"]
                )
                roots.update(zip(known, found, strict=True))
            # Dividing by infinity gives zero.
            roots.update(
                {i: self._parameters[i].new_full((), math.inf) for i in members if not states[i]}
            )
        return roots

    def _states(self) -> list[dict[str, Any]]:
        # Not by [], which would add entries.
        return [self._optimizer.state.get(p, {}) for p in self._parameters]


def _step_of(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Return the number of a parameter's updates, from its state or (in some optimizers) its group.

    Raises:
        ValueError: the optimizer does not say.
    """
    step = state.get("step", group.get("step"))
    if step is None:
        raise ValueError(
            "the optimizer does not store how many updates it made: give the direction "
            "precondition='none'"
        )
    return torch.as_tensor(step)


def second_moment_roots(
    moments: list[Tensor], steps: list[Tensor], *, beta2: float, eps: float
) -> list[Tensor]:
    """Return √v̂ + ε for each second moment v and its number of steps t: v̂ = v/(1 − β₂^t)."""
    corrections = (1 - beta2 ** torch.stack(steps).double()).sqrt()
    roots = list(torch._foreach_sqrt(moments))
    # Steps are on the CPU; if the optimizer is fused or capturable, on the device: do not wait.
    torch._foreach_div_(
        roots, corrections.tolist() if corrections.is_cpu else list(corrections.unbind())
    )
    torch._foreach_add_(roots, eps)
    return roots


def require_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless every parameter group has heavy-ball momentum without look-ahead."""
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
