"""A direction's state from step to step: made, reset, saved and loaded, whatever it holds."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from egtrain.optim.direction import Direction, State


class DirectionState:
    """A direction's state for each worker of this process, and for all together.

    Args:
        direction: the direction that has this state.
        parameters: the shifted parameters; each list of a state has one tensor for each.
        workers: the numbers of the workers.

    Raises:
        ValueError: the direction keeps another number of tensors.
    """

    @torch.no_grad()
    def __init__(self, direction: Direction, parameters: list[Tensor], workers: range) -> None:
        self._direction = direction
        self._parameters = parameters
        self.by_worker: dict[int, State] = {k: direction.worker_state(parameters) for k in workers}
        self.shared = direction.shared_state(parameters)
        for state in (self._first, self.shared):
            for name, tensors in state.items():
                if len(tensors) != len(parameters):
                    raise ValueError(
                        f"the direction keeps {len(tensors)} tensors of '{name}' for "
                        f"{len(parameters)} parameters: keep one for each"
                    )

    @property
    def _first(self) -> State:
        return next(iter(self.by_worker.values()))

    def belong_to(self, worker: int) -> None:
        """Give the only worker here another number."""
        (state,) = self.by_worker.values()
        self.by_worker = {worker: state}

    def of_parameters(self, worker: int, numbers: Sequence[int]) -> State:
        """Return a worker's state for some parameters, given by their numbers."""
        return {name: [ts[i] for i in numbers] for name, ts in self.by_worker[worker].items()}

    @torch.no_grad()
    def forget(self, worker: int) -> None:
        """Reset a worker's state to its initial value."""
        copy_state(self.by_worker[worker], self._direction.worker_state(self._parameters))

    def state_dict(self) -> dict[str, Any]:
        """Return a copy; tensors of `worker_state` are [workers, ...], in `workers`' order."""
        states = self.by_worker.values()
        return {
            "workers": list(self.by_worker),
            "worker_state": {
                name: [torch.stack(rows) for rows in zip(*(s[name] for s in states), strict=True)]
                for name in self._first
            },
            "shared_state": {name: [t.clone() for t in ts] for name, ts in self.shared.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, for the same parameters and workers.

        Raises:
            ValueError: the state belongs to other parameters, workers or another direction.
        """
        workers, by_worker, shared = (
            state[name] for name in ("workers", "worker_state", "shared_state")
        )
        if self._first and workers != list(self.by_worker):
            raise ValueError(
                f"the extrapolation state is that of workers {workers}, but this process has "
                f"{list(self.by_worker)}: let each process load the state that it saved"
            )
        expected = shapes(self._first, len(self.by_worker)), shapes(self.shared)
        if (shapes(by_worker), shapes(shared)) != expected:
            raise ValueError(
                "the extrapolation state belongs to other parameters, workers or another direction"
            )
        for row, kept in enumerate(self.by_worker.values()):
            copy_state(kept, {name: [t[row] for t in rows] for name, rows in by_worker.items()})
        copy_state(self.shared, shared)


def shapes(state: State, *leading: int) -> dict[str, list[tuple[int, ...]]]:
    """Return the shape of each tensor of a state, after the leading dimensions."""
    return {name: [(*leading, *t.shape) for t in tensors] for name, tensors in state.items()}


def copy_state(into: State, state: State) -> None:
    """Copy a state into another one with the same names and shapes."""
    for name, tensors in into.items():
        torch._foreach_copy_(tensors, state[name])
