"""How the gradients of blocks become what each worker remembers of an update.

There is one class for each kind of loop; `several_workers.py` and `ddp.py` have further ones.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from egtrain.optim.trained import Trained

Remember = Callable[[int, Sequence[int] | None, list[Tensor]], None]
"""Lets a worker remember gradients: its number, the parameters' places (None: all), and those."""


class Remembering(Protocol):
    """The gradients of one kind of loop, from the first block of an update to the update."""

    def begin_block(self, worker: int) -> None:
        """Begin a block, before its ζ is taken."""

    def end_second_gradient(self) -> None:
        """Raise RuntimeError if the second gradient is not the worker's own."""

    def end_block(self, worker: int) -> None:
        """Take the gradient that the block left in `.grad`."""

    def leave_block(self) -> None:
        """Leave a block that an exception has ended."""

    def averaged(self, norm: Tensor | None) -> None:
        """Take the gradient in `.grad`, of this norm if it is given, as the mean, not clipped."""

    def clip_factor(self) -> Tensor | None:
        """Return the factor by which `.grad` has shrunk since it was the mean (a scalar).

        None if the workers' gradients are remembered as clipped.
        """

    def remember(self, gradients: list[Tensor]) -> None:
        """Let the workers remember their gradients of the update made with these gradients."""

    def skip(self) -> None:
        """Drop the blocks since the last update, which is left out."""

    def leave_out_where(self, overflow: Tensor | None) -> None:
        """Let the device leave the update out if there was an overflow (a scalar above zero)."""

    def is_amid_update(self) -> bool:
        """Return whether something is kept of blocks since the last update."""


class OneWorker:
    """The only worker in the only process: its gradient is that of the update."""

    def __init__(self, worker: int, remember: Remember) -> None:
        self._worker = worker
        self._remember = remember
        self._blocks = 0

    def begin_block(self, worker: int) -> None:
        """Begin a block."""

    def end_second_gradient(self) -> None:
        """Accept the second gradient: nobody else's can be in it."""

    def end_block(self, worker: int) -> None:
        """Leave the gradient where it is until the update."""
        self._blocks += 1

    def leave_block(self) -> None:
        """Leave a block that an exception has ended."""

    def averaged(self, norm: Tensor | None) -> None:
        """Accept that the mean over one worker is its own."""

    def clip_factor(self) -> None:
        """Return None: the gradient is remembered as clipped."""

    def remember(self, gradients: list[Tensor]) -> None:
        """Remember the gradient of the update, unless no block was before it."""
        if self._blocks:
            self._remember(self._worker, None, gradients)
        self._blocks = 0

    def skip(self) -> None:
        """Drop the blocks since the last update."""
        self._blocks = 0

    def leave_out_where(self, overflow: Tensor | None) -> None:
        """Accept it: what is remembered stays as it was."""

    def is_amid_update(self) -> bool:
        """Return False: the gradient is in `.grad` alone."""
        return False


class OneBlockEach:
    """Workers with one block each an update, whose gradients the caller averages.

    `.grad` is zero at the start of each block. This needs no memory besides what is remembered.

    Args:
        trained: the parameters.
        remember: lets a worker remember its gradient.
        forget_past: resets what all workers remember.
    """

    def __init__(
        self,
        trained: Trained,
        remember: Remember,
        forget_past: Callable[[Tensor | None], None],
    ) -> None:
        self._trained = trained
        self._remember = remember
        self._forget_past = forget_past
        self._seen: set[int] = set()
        self._norm: Tensor | None = None
        self._mean: list[tuple[Tensor | None, int]] = []
        """`.grad` and its version when it was the mean."""

    def begin_block(self, worker: int) -> None:
        """Begin the worker's block.

        Raises:
            RuntimeError: it had one in this update already.
        """
        if worker in self._seen:
            raise RuntimeError(
                f"worker {worker} has had its block of this update: put all its mini-batches into "
                "one block, or call skip_update() if the update is left out"
            )

    def end_second_gradient(self) -> None:
        """Accept the second gradient: nobody else's can be in it."""

    def end_block(self, worker: int) -> None:
        """Let the worker remember its gradient."""
        self._seen.add(worker)
        self._remember(worker, None, self._trained.gradients())

    def leave_block(self) -> None:
        """Leave a block that an exception has ended."""

    def averaged(self, norm: Tensor | None) -> None:
        """Note the norm of the mean gradient."""
        self._norm = self._trained.norm() if norm is None else norm
        self._mean = versions(self._trained.parameters)

    def clip_factor(self) -> Tensor | None:
        """Return the factor by which the mean gradient was clipped.

        Raises:
            RuntimeError: the caller has not said when `.grad` was the mean.
        """
        if self._seen and self._norm is None:
            raise not_said_to_be_averaged()
        # Nothing is computed where nothing has happened.
        if self._norm is None or not changed(self._mean, self._trained.parameters):
            return None
        return shrinkage(self._norm, self._trained)

    def remember(self, gradients: list[Tensor]) -> None:
        """Begin the next update: the workers have remembered their gradients."""
        self._seen.clear()
        self._norm = None

    def skip(self) -> None:
        """Drop the blocks since the last update, and all that their workers remember."""
        if self._seen:
            self._forget_past(None)
        self._seen.clear()
        self._norm = None

    def leave_out_where(self, overflow: Tensor | None) -> None:
        """Forget the past, which was overwritten in the blocks."""
        if overflow is not None:
            self._forget_past(overflow)

    def is_amid_update(self) -> bool:
        """Return whether a worker had its block."""
        return bool(self._seen)


def versions(parameters: Sequence[Tensor]) -> list[tuple[Tensor | None, int]]:
    """Return each parameter's `.grad` and how often it was changed in place."""
    return [(p.grad, version_of(p.grad)) for p in parameters]


def changed(before: list[tuple[Tensor | None, int]], parameters: Sequence[Tensor]) -> bool:
    """Return whether `.grad` is another than it was, or was changed in place."""
    pairs = zip(parameters, before, strict=True)
    return any(p.grad is not old or version_of(old) != version for p, (old, version) in pairs)


def version_of(gradient: Tensor | None) -> int:
    """Return how often a gradient was changed in place."""
    return -1 if gradient is None else gradient._version


def shrinkage(norm: Tensor, trained: Trained) -> Tensor:
    """Return the factor by which the gradients' norm has changed, clipped or unscaled."""
    now = trained.norm()
    scale, _ = trained.scaling()
    factor = now / norm
    # A norm of the same numbers in another order differs by rounding: that is no clipping.
    same = (factor - 1).abs() < 64 * torch.finfo(factor.dtype).eps
    factor = torch.where(same | (norm == 0), 1.0, factor)
    return factor if scale is None else factor / scale


def not_said_to_be_averaged() -> RuntimeError:
    """Return the error of a loop that averages gradients without saying when."""
    return RuntimeError(
        "the workers' gradients are averaged outside: call extrapolation.averaged() once .grad is "
        "their mean, before clipping and the update"
    )
