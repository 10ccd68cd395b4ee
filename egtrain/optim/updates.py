"""The optimizer's updates: their number, and what is remembered of each."""

import weakref
from typing import Any

import torch
from torch import Tensor

from egtrain.optim.direction_state import DirectionState
from egtrain.optim.remembering import Remembering, changed, versions
from egtrain.optim.shifting import Weights
from egtrain.optim.trained import Trained
from egtrain.optim.wrappers import watch_updates


class Updates:
    """Follows an optimizer's updates from the blocks before each to its end.

    Args:
        optimizer: its `step` calls the hooks that are registered here.
        trained: the parameters.
        kept: the direction, which observes the mean gradient and the update, and its state.
        remembering: how the workers' gradients come out of this kind of loop.
        weights: the parameters' weights.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        trained: Trained,
        kept: DirectionState,
        remembering: Remembering,
        weights: Weights,
    ) -> None:
        self._optimizer = optimizer
        self._trained = trained
        self._kept = kept
        self._remembering = remembering
        self._weights = weights
        self.steps = 0
        """Updates made so far."""
        self.made_here = False
        """Whether one was made by this object, and not only by that whose state was loaded."""
        self.blocks = 0
        """Blocks since the last update."""
        self.blocks_in_step = 0
        """Those of them that the closure of this step has made."""
        self.inside_block = False
        self.inside_step = False
        """Whether the optimizer is in a step with a closure."""
        self.clip_factor: Tensor | None = None
        """The factor by which the mean of the remembered gradients was clipped."""
        self.updated: list[bool] = [True] * len(trained.parameters)
        """Whether each parameter had a gradient in the last update."""
        self._noted: tuple[list[Tensor], Tensor | None] = [], None
        self._before: list[Tensor] = []
        self._watch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The copy of an optimizer has no hooks.
        self._watch()

    def skip(self) -> None:
        """Drop the blocks since the last update."""
        self._remembering.skip()
        self.blocks, self.inside_step = 0, False

    def end_block(self) -> None:
        """Count a block."""
        self._come_last()
        self.blocks += 1
        self.blocks_in_step += self.inside_step

    def _watch(self) -> None:
        # Weak, so that an extrapolation that the caller lets go takes its memory with it, and
        # observes no further updates.
        this = weakref.ref(self)

        def begin(*arguments: Any) -> Any:
            updates = this()
            return None if updates is None else updates._begin(*arguments)

        def end(*arguments: Any) -> None:
            updates = this()
            if updates is not None:
                updates._end(*arguments)

        self._hook = watch_updates(self._optimizer, begin, end)

    def _come_last(self) -> None:
        """See the gradients after all other hooks, which may clip them."""
        hooks = self._optimizer._optimizer_step_pre_hooks
        if next(reversed(hooks)) != self._hook:
            hooks[self._hook] = hooks.pop(self._hook)

    @torch.no_grad()
    def _begin(
        self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.inside_block:
            raise RuntimeError(
                "optimizer.step() belongs after the shifted() block, where the weights are x again"
            )
        if self.inside_step:  # the step before has failed
            self.skip()
        if not any(callable(value) for value in (*args, *kwargs.values())):
            if self._kept.direction.observes_updates:
                self._before = self._weights.keep()
            self._note(copy=False)
            self._remember()
            return None
        if self._kept.direction.observes_updates:
            # Not `keep`, since there are further blocks before the update.
            self._before = [p.detach().clone() for p in self._trained.parameters]
        self.inside_step, self.blocks_in_step = True, 0
        return (
            tuple(self._noting(value) for value in args),
            {name: self._noting(value) for name, value in kwargs.items()},
        )

    def _noting(self, value: Any) -> Any:
        """Return a closure that notes its gradients; another value as it is."""
        if not callable(value):
            return value

        def noting() -> Any:
            before = versions(self._trained.parameters)
            try:
                result = value()
                no_block = self.blocks and not self.blocks_in_step
                if no_block and changed(before, self._trained.parameters):
                    raise RuntimeError(
                        "the closure computes another gradient than the block's: put the shifted() "
                        "block into the closure, or call extrapolation.step(closure)"
                    )
            except BaseException:
                self.skip()
                raise
            self._note(copy=True)
            return result

        return noting

    @torch.no_grad()
    def _note(self, copy: bool) -> None:
        """Note the gradients with which the optimizer makes its update, and how they were clipped.

        They are noted before the update, since torch's SGD overwrites them.
        """
        self.updated = [p.grad is not None for p in self._trained.parameters]
        if self._kept.has_worker_state or self._kept.shared:
            gradients = self._trained.gradients_of_update()
            factor = self._remembering.clip_factor()
            self._noted = [g.clone() for g in gradients] if copy else gradients, factor

    def _remember(self) -> None:
        gradients, factor = self._noted
        self._noted = [], None
        _, overflow = self._trained.scaling()
        with self._kept.unchanged_where(overflow):
            self._remembering.remember(gradients)
            if self._kept.shared and gradients:
                self._kept.direction.observe_mean_gradient(self._kept.shared, gradients)
        self._remembering.leave_out_where(overflow)
        if self.blocks:
            if factor is not None and overflow is not None:
                before = 1.0 if self.clip_factor is None else self.clip_factor
                factor = torch.where(overflow > 0, before, factor)
            self.clip_factor = factor

    @torch.no_grad()
    def _end(self, *arguments: object) -> None:
        if self.inside_step:
            self._remember()
        if self._kept.direction.observes_updates and self._before:
            _, overflow = self._trained.scaling()
            with self._kept.unchanged_where(overflow):
                after = self._trained.parameters
                self._kept.direction.observe_update(self._kept.shared, self._before, after)
        self._before = []
        self.steps += 1
        self.made_here = True
        self.blocks, self.inside_step = 0, False
