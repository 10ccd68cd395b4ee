"""Several workers in one process, which take their blocks one after the other."""

from typing import Any

import torch
from torch import Tensor

from egtrain.optim.processes import process_count
from egtrain.optim.remembering import (
    Remember,
    changed,
    not_said_to_be_averaged,
    shrinkage,
    version_of,
    versions,
)
from egtrain.optim.trained import Trained, total_norm


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

    def averaged(self, norm: Tensor | None) -> None:
        """Note the norm of the mean gradient."""
        self._norm = self._trained.norm() if norm is None else norm

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


def had_graph(gradient: Tensor | None) -> bool:
    """Return whether a gradient was made with create_graph=True."""
    return gradient is not None and gradient.requires_grad
