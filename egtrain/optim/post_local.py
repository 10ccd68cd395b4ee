"""Post-local SGD: large-batch training first, then local SGD with averages of the weights.

Lin, Stich, Patel, Jaggi: Don't Use Large Mini-Batches, Use Local SGD, ICLR 2020, arXiv 1808.07217.
"""

import copy

import torch
from torch import Tensor


class PostLocal:
    """When the local phase begins, when it averages weights, and each worker's optimizer in it.

    For the first `start` updates all workers share one optimizer. After that each worker updates
    its own weights with its own copy of the optimizer, and every `period` updates the weights are
    averaged. Momentum is not averaged, and the learning rate does not change.

    Args:
        optimizer: the base optimizer of the first phase.
        workers: the numbers of the workers that this process carries.
        start: the number of updates before the first local one.
        period: H, the updates between two averages; 1 without momentum equals the first phase.

    Raises:
        ValueError: `start` is negative, or `period` is below 1.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, workers: range, *, start: int, period: int
    ) -> None:
        if start < 0 or period < 1:
            raise ValueError(
                f"start must be at least 0 and period at least 1, not {start} and {period}"
            )
        self.start = start
        self.period = period
        self.optimizers: dict[int, torch.optim.Optimizer] = {}
        """By worker; empty before `begin`."""
        self._optimizer = optimizer
        self._workers = workers

    def is_local(self, step: int) -> bool:
        """Return whether the update after `step` completed ones is local."""
        return step >= self.start

    def averages_after(self, step: int) -> bool:
        """Return whether the weights are averaged after `step` updates."""
        return step > self.start and (step - self.start) % self.period == 0

    def averages(self, step: int) -> int:
        """Return how many times weights have been averaged in the first `step` updates."""
        return max(step - self.start, 0) // self.period

    def begin(self) -> None:
        """Give each worker a copy of the shared optimizer, over the same parameters."""
        parameters = {id(p): p for group in self._optimizer.param_groups for p in group["params"]}
        # With the parameters in the memo, deepcopy copies the state and shares the parameters.
        self.optimizers = {
            worker: copy.deepcopy(self._optimizer, dict(parameters)) for worker in self._workers
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return the workers' states, [workers, ...] by `PARAMETER.NAME`; empty before `begin`."""
        states = [optimizer.state_dict()["state"] for optimizer in self.optimizers.values()]
        return {
            f"{index}.{name}": torch.stack(
                [torch.as_tensor(state[index][name]) for state in states]
            )
            for index, entries in (states[0].items() if states else ())
            for name, value in entries.items()
            if value is not None
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned after `begin`, for the same number of workers."""
        self.begin()
        for row, optimizer in enumerate(self.optimizers.values()):
            states: dict[int, dict[str, Tensor]] = {}
            for key, stacked in state.items():
                index, _, name = key.partition(".")
                states.setdefault(int(index), {})[name] = stacked[row].clone()
            optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
