"""How the gradients of blocks become what each worker remembers of an update.

There is one class for each kind of loop; `ddp.py` has that of DistributedDataParallel.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from egtrain.optim.processes import process_count
from egtrain.optim.trained import Trained, total_norm

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

    def averaged(self) -> None:
        """Take the gradient in `.grad` as the mean over the workers, not clipped."""

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

    def averaged(self) -> None:
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

    def averaged(self) -> None:
        """Note the norm of the mean gradient."""
        self._norm = self._trained.norm()

    def clip_factor(self) -> Tensor | None:
        """Return the factor by which the mean gradient was clipped.

        Raises:
            RuntimeError: the caller has not said when `.grad` was the mean.
        """
        if self._seen and self._norm is None:
            raise not_said_to_be_averaged()
        return None if self._norm is None else shrinkage(self._norm, self._trained)

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


class SeveralWorkers:
    """Workers with any number of blocks an update, in any order.

    Their gradients are added in one `.grad`, or each is taken away and the loop puts the mean into
    `.grad`. What each has added in this update is kept apart, in one more gradient a worker.

    Args:
        trained: the parameters.
        remember: lets a worker remember its gradient.
        others: whether further workers are in other processes, so that the loop has to say when
            `.grad` is the mean.
    """

    def __init__(self, trained: Trained, remember: Remember, others: bool) -> None:
        self._trained = trained
        self._remember = remember
        self._others = others
        self._added: dict[int, list[Tensor]] = {}
        self._in_one_grad = True
        self._norm: Tensor | None = None
        self._last: list[tuple[Tensor | None, int]] = []
        """`.grad` and its version at the end of the last block."""
        self._before: list[Tensor | None] = []
        """`.grad` of the blocks before, while a block has its own; empty in the first."""
        self._own: list[Tensor | None] = []
        self._watches: list[Any] = []
        """Handles of hooks, to be removed at the end of the block."""
        self._untouched: dict[int, Tensor] = {}
        """The block's own `.grad` of parameters that no gradient has come to, by their ids."""
        self._zeroed: list[bool] = []
        """Whether the block had zeroed `.grad`, for each parameter that a gradient came to."""

    def begin_block(self, worker: int) -> None:
        """Begin a block, with a `.grad` of its own in place of what others have added.

        Raises:
            RuntimeError: the worker's earlier gradient in this update was taken away.
        """
        if not self._added:
            return
        parameters = self._trained.parameters
        if changed(self._last, parameters):
            self._begin_at_zero(worker)
        self._before = [p.grad for p in parameters]
        self._own = [None if g is None else torch.zeros_like(g) for g in self._before]
        self._zeroed = []
        for p, own in zip(parameters, self._own, strict=True):
            p.grad = own
            if own is not None:
                self._untouched[id(p)] = own
                self._watches.append(
                    p.register_post_accumulate_grad_hook(self._arrive)  # type: ignore[no-untyped-call]
                )

    def end_second_gradient(self) -> None:
        """Accept the second gradient: nobody else's can be in it."""

    @torch.no_grad()
    def end_block(self, worker: int) -> None:
        """Keep what the block has added, and add it to what was in `.grad` before.

        Raises:
            RuntimeError: the worker's earlier gradient in this update was taken away, or it cannot
                be told whether it was.
        """
        self._unwatch()
        parameters = self._trained.parameters
        contribution = self._trained.gradients()
        if any(self._zeroed):
            if not all(self._zeroed):
                self.leave_block()
                raise RuntimeError(
                    "a part of .grad was zeroed in the block: call zero_grad() of the whole "
                    "optimizer, or outside of it"
                )
            self._begin_at_zero(worker)
        elif self._before:
            self._add_before()
        if worker in self._added:
            torch._foreach_add_(self._added[worker], contribution)
        else:
            self._added[worker] = [g.clone() for g in contribution]
        self._last = versions(parameters)
        self._before, self._own = [], []

    def leave_block(self) -> None:
        """Put back what was in `.grad` before a block that an exception has ended."""
        self._unwatch()
        for p, before in zip(self._trained.parameters, self._before, strict=bool(self._before)):
            p.grad = before
        self._before, self._own = [], []

    def averaged(self) -> None:
        """Note the norm of the mean gradient."""
        self._norm = self._trained.norm()

    def clip_factor(self) -> Tensor | None:
        """Return the factor by which the gradient was clipped.

        Raises:
            RuntimeError: there are workers elsewhere, and the loop has not said when `.grad` was
                the mean.
        """
        if not self._added:
            return None
        if self._norm is None and self._others and process_count() > 1:
            raise not_said_to_be_averaged()
        if self._norm is None:
            total = [sum(parts[1:], parts[0]) for parts in zip(*self._added.values(), strict=True)]
            self._norm = total_norm(total) / (1 if self._in_one_grad else len(self._added))
        return shrinkage(self._norm, self._trained)

    def remember(self, gradients: list[Tensor]) -> None:
        """Let each worker remember what it has added in this update."""
        for worker, added in self._added.items():
            self._remember(worker, None, added)
        self.skip()

    def skip(self) -> None:
        """Drop the blocks since the last update."""
        self._added.clear()
        self._last, self._before, self._own = [], [], []
        self._in_one_grad, self._norm = True, None

    def leave_out_where(self, overflow: Tensor | None) -> None:
        """Accept it: what is remembered stays as it was."""

    def is_amid_update(self) -> bool:
        """Return whether a worker had a block."""
        return bool(self._added)

    def _arrive(self, p: Tensor) -> None:
        """Note whether the gradient was zeroed before the first addition to it."""
        own = self._untouched.pop(id(p), None)
        if own is None or p.grad is None:
            return
        if p.grad is own:  # zeroing in place is a change as the addition is
            self._zeroed.append(version_of(own) > 1)
        else:  # an addition with create_graph=True replaces it too
            self._zeroed.append(not p.grad.requires_grad)

    def _unwatch(self) -> None:
        for watch in self._watches:
            watch.remove()
        self._watches.clear()
        self._untouched.clear()

    def _begin_at_zero(self, worker: int) -> None:
        """Note that the loop takes each worker's gradient away.

        Raises:
            RuntimeError: this worker had one already.
        """
        self._before, self._own = [], []
        if worker in self._added:
            raise RuntimeError(
                f"worker {worker} has a second block in this update, but its first gradient is no "
                "longer in .grad: take all its mini-batches in one block, or call skip_update() if "
                "the update is left out"
            )
        self._in_one_grad = False

    @torch.no_grad()
    def _add_before(self) -> None:
        """Add the block's gradients to those before it, in `.grad` of the blocks before.

        Raises:
            RuntimeError: one was replaced, by no backward pass.
        """
        pairs = list(zip(self._trained.parameters, self._before, self._own, strict=True))
        if any(
            p.grad is not own and not had_graph(p.grad) for p, _, own in pairs if own is not None
        ):
            self.leave_block()
            raise RuntimeError(
                ".grad was replaced in the block, so it cannot be told what the block has added: "
                "call backward() in it, and zero_grad() outside of it"
            )
        for p, before, _ in pairs:
            if before is not None and p.grad is not None:
                p.grad = before.add_(p.grad)


def versions(parameters: Sequence[Tensor]) -> list[tuple[Tensor | None, int]]:
    """Return each parameter's `.grad` and how often it was changed in place."""
    return [(p.grad, version_of(p.grad)) for p in parameters]


def changed(before: list[tuple[Tensor | None, int]], parameters: Sequence[Tensor]) -> bool:
    """Return whether `.grad` is another than it was, or was changed in place."""
    pairs = zip(parameters, before, strict=True)
    return any(p.grad is not old or version_of(old) != version for p, (old, version) in pairs)


def had_graph(gradient: Tensor | None) -> bool:
    """Return whether a gradient was made with create_graph=True."""
    return gradient is not None and gradient.requires_grad


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
