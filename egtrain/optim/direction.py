"""What a choice of ζ is: a direction, the state that it keeps, and the point that it sees."""

# ruff: noqa: B027 - the empty methods are for a direction to leave out or to fill.

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from egtrain.optim.base_state import BaseState
from egtrain.optim.randomness import generator_for

State = dict[str, list[Tensor]]
"""What a direction keeps, by names of its choice; each list has one tensor a parameter."""


@dataclass(frozen=True)
class Point:
    """What a direction may look at when worker k extrapolates at step t; every list has one tensor
    a parameter.
    """

    worker: int
    """k."""
    step: int
    """t, the updates that were made before."""
    parameters: list[Tensor]
    """x_t, the unshifted weights."""
    learning_rates: list[float]
    """γ_t of each parameter's group."""
    state: State
    """What the direction keeps for this worker."""
    shared: State
    """What it keeps for all workers together."""
    second_gradient: list[Tensor]
    """∇f^k(x_t), the gradient at the unshifted weights; empty for a direction of one gradient."""
    clip_factor: Tensor | None
    """What ḡ_{t−1} was multiplied by (a scalar tensor), and g^k_{t−1} has to be; None where nothing
    was clipped."""
    base: BaseState
    """What the base optimizer keeps: its momentum, and how it scales a gradient."""
    seed: int

    def generator(self) -> torch.Generator:
        """Return the generator of this (seed, worker, step)."""
        return generator_for(
            self.seed, "extrapolation", self.worker, self.step, device=self.parameters[0].device
        )


class Direction(ABC):
    """A choice of ζ: one row of the table of variants.

    A direction is a value without state; what it keeps from step to step is made by `worker_state`
    and `shared_state`, and `Extrapolation` holds, saves and resumes it. A direction that keeps
    nothing is `zeta` alone:

    >>> class AgainstWeights(Direction):
    ...     def zeta(self, at):
    ...         return [-0.01 * x for x in at.parameters]

    One that keeps something changes it in place where it observes what training does:

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
    """Gradients a step: 2 for a direction that looks at `Point.second_gradient`."""

    @abstractmethod
    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ, one tensor a parameter, newly allocated."""

    def check_base(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ValueError where the direction is not defined over a base optimizer."""

    def worker_state(self, parameters: list[Tensor]) -> State:
        """Return what it keeps for each worker, as it is before the first step."""
        return {}

    def shared_state(self, parameters: list[Tensor]) -> State:
        """Return what it keeps once for all workers, as it is before the first step."""
        return {}

    def observe_gradient(self, state: State, gradients: list[Tensor]) -> None:
        """Take g^k_t, not clipped, into the worker's state, at the end of its block.

        Both have one tensor a parameter, but not always of all parameters: with
        DistributedDataParallel they come some at a time.
        """

    def observe_mean_gradient(self, state: State, gradients: list[Tensor]) -> None:
        """Take ḡ_t, clipped where it is, into the shared state, before the update."""

    def observe_update(self, state: State, before: list[Tensor], after: list[Tensor]) -> None:
        """Take the update from x_t to x_{t+1} into the shared state, after it was made."""
