"""A direction's state from step to step: made, reset, saved and loaded, whatever it holds."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from egtrain.optim.direction import Direction, State
from egtrain.optim.sharded import copy_all


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
        self.direction = direction
        self._parameters = parameters
        self._types = [(p.dtype, p.device) for p in parameters]
        self.by_worker: dict[int, State] = {k: direction.worker_state(parameters) for k in workers}
        self.shared = direction.shared_state(parameters)
        self.has_worker_state = bool(self._first)
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

    @property
    def _states(self) -> list[State]:
        return [*self.by_worker.values(), self.shared]

    def of_parameters(self, worker: int, numbers: Sequence[int] | None) -> State:
        """Return a worker's state for some parameters, given by their numbers, or for all."""
        state = self.by_worker[worker]
        if numbers is None:
            return state
        return {name: [ts[i] for i in numbers] for name, ts in state.items()}

    @torch.no_grad()
    def forget(self, where: Tensor | None = None) -> None:
        """Reset the state of all workers here to its initial value.

        Args:
            where: a scalar; the device does so if it is above zero. None: in any case.
        """
        for state in self.by_worker.values():
            first = self.direction.worker_state(self._parameters)
            if where is None:
                copy_state(state, first)
            else:
                copy_state_where(where, state, first)

    @torch.no_grad()
    def follow(self, parameters: list[Tensor], places: Sequence[int | None]) -> None:
        """Take up a change of parameters; new ones have fresh state.

        Args:
            parameters: those after the change.
            places: for each, its place before the change, or None.
        """
        self._parameters = parameters
        self._types = [
            (p.dtype, p.device) if i is None else self._types[i]
            for p, i in zip(parameters, places, strict=True)
        ]
        fresh = [self.direction.worker_state(parameters) for _ in self.by_worker]
        for state, new in zip(
            self._states, [*fresh, self.direction.shared_state(parameters)], strict=True
        ):
            for name, tensors in state.items():
                state[name] = [
                    new[name][place] if i is None else tensors[i] for place, i in enumerate(places)
                ]

    @torch.no_grad()
    def follow_types(self) -> None:
        """Convert the state of parameters whose type or device has changed."""
        for i, (p, (dtype, device)) in enumerate(zip(self._parameters, self._types, strict=True)):
            if (p.dtype, p.device) == (dtype, device):
                continue
            self._types[i] = p.dtype, p.device
            for state in self._states:
                for tensors in state.values():
                    t = tensors[i]
                    tensors[i] = t.to(p.device, p.dtype if t.dtype == dtype else t.dtype)

    @contextmanager
    def unchanged_where(self, condition: Tensor | None) -> Iterator[None]:
        """Undo what the block does to the state if the condition (a scalar) is above zero.

        The device decides; None stands for no condition.
        """
        if condition is None:
            yield
            return
        kept = [{n: [t.clone() for t in ts] for n, ts in state.items()} for state in self._states]
        yield
        for state, before in zip(self._states, kept, strict=True):
            copy_state_where(condition, state, before)

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
    def load_state_dict(self, state: dict[str, Any], places: Sequence[int]) -> None:
        """Restore what `state_dict` returned, for the same workers.

        Args:
            state: its value.
            places: the place of each parameter in it.

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
        by_worker, shared = (
            {name: [tensors[i] for i in places] for name, tensors in part.items()}
            for part in (by_worker, shared)
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


def copy_state_where(condition: Tensor, into: State, state: State) -> None:
    """Copy a state if the condition (a scalar) is above zero; the device decides."""
    for name, tensors in into.items():
        for t, new in zip(tensors, state[name], strict=True):
            torch.where(condition.to(t.device) > 0, new, t, out=t)


def copy_state(into: State, state: State) -> None:
    """Copy a state into another one with the same names and shapes."""
    for name, tensors in into.items():
        copy_all(tensors, state[name])
