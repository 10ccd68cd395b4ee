"""A choice of ζ: the direction, its state, and the point at which it is evaluated."""

# ruff: noqa: B027 - a direction may override the empty methods, and need not.

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from egtrain.optim.base_state import BaseState
from egtrain.optim.randomness import generator_for

State = dict[str, list[Tensor]]
"""A direction's state, by names of its choice; each list has one tensor per parameter."""


@dataclass(frozen=True)
class Point:
    """What a direction sees for worker k at step t; each list has one entry per parameter."""

    worker: int | None
    """k; None in one of several processes that was not told which worker it is."""
    step: int
    """t, the number of updates made so far."""
    parameters: list[Tensor]
    """x_t, the unshifted weights."""
    learning_rates: list[float]
    """γ_t of each parameter's group."""
    state: State
    """The direction's state for this worker."""
    shared: State
    """The direction's state for all workers together."""
    second_gradient: list[Tensor]
    """∇f^k(x_t), the gradient at the unshifted weights; empty for a direction of one gradient."""
    clip_factor: Tensor | None
    """The factor (a scalar tensor) that clipped ḡ_{t−1}, to be applied to g^k_{t−1} as well; None
    if the gradients of the state are clipped already."""
    base: BaseState
    """The base optimizer's state: its momentum, and how it scales a gradient."""
    seed: int

    def generator(self) -> torch.Generator:
        """Return a generator seeded by (seed, worker, step).

        Raises:
            RuntimeError: the worker is not known.
        """
        if self.worker is None:
            raise RuntimeError(
                "this direction draws noise for each worker, and this process is one of several: "
                "pass Extrapolation(..., model=model) with your DistributedDataParallel, or "
                "workers=range(rank, rank + 1)"
            )
        return generator_for(
            self.seed, "extrapolation", self.worker, self.step, device=self.parameters[0].device
        )


class Direction(ABC):
    """A choice of ζ: one row of the table of variants.

    A direction itself never changes. Its state from step to step is made by `worker_state` and
    `shared_state`; `Extrapolation` holds, saves and resumes it. Without state, a direction needs
    only `zeta`:

    >>> class AgainstWeights(Direction):
    ...     def zeta(self, at):
    ...         return [-0.01 * x for x in at.parameters]

    One with state changes it in place when it observes a gradient or an update:

    >>> class AverageOfGradients(Direction):
    ...     def worker_state(self, parameters):
    ...         return {"average": [torch.zeros_like(x) for x in parameters]}
    ...
    ...     def observe_gradient(self, state, gradients):
    ...         torch._foreach_lerp_(state["average"], gradients, 0.1)
    ...
    ...     def zeta(self, at):
    ...         return [
    ...             0.5 * rate * average
    ...             for rate, average in zip(at.learning_rates, at.state["average"])
    ...         ]
    """

    gradients: ClassVar[int] = 1
    """Gradients per step: 2 for a direction that uses `Point.second_gradient`."""

    @property
    def observes_updates(self) -> bool:
        """Whether it overrides `observe_update`."""
        return type(self).observe_update is not Direction.observe_update

    @abstractmethod
    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ: one newly allocated tensor per parameter."""

    def check_base(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ValueError if the direction is not defined for this base optimizer."""

    def worker_state(self, parameters: list[Tensor]) -> State:
        """Return the initial state of one worker."""
        return {}

    def shared_state(self, parameters: list[Tensor]) -> State:
        """Return the initial state that all workers share."""
        return {}

    def observe_gradient(self, state: State, gradients: list[Tensor]) -> None:
        """Update the worker's state with g^k_t, its gradient of the whole update.

        Both have one tensor per parameter, but not always for all parameters:
        DistributedDataParallel delivers one at a time. Gradients here and below are those of what
        is minimised: the negative of `.grad` in a group with `maximize=True`.
        """

    def observe_mean_gradient(self, state: State, gradients: list[Tensor]) -> None:
        """Update the shared state with ḡ_t, after any clipping and before the update."""

    def observe_update(self, state: State, before: list[Tensor], after: list[Tensor]) -> None:
        """Update the shared state after the update from x_t to x_{t+1}."""
