"""The extrapolation framework: take the gradient at x − ζ, make the update from x.

Lin, Kong, Stich, Jaggi: Extrapolation for Large-batch Training in Deep Learning, ICML 2020
(arXiv 2006.05720).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from egtrain.optim.base_state import BaseState
from egtrain.optim.direction import Direction, Point
from egtrain.optim.direction_state import DirectionState


class Averaging(Protocol):
    """Observes a worker's gradients during a block, at whose end `.grad` is already a mean."""

    def begin_block(self) -> None:
        """Begin a block: nothing has been observed yet."""

    def end_second_gradient(self) -> None:
        """Raise RuntimeError if the second gradient was averaged."""

    def end_block(self) -> Collection[int]:
        """Return the numbers of the parameters whose gradients were observed in the block.

        Raises:
            RuntimeError: the gradients were not averaged exactly once in it.
        """


class Extrapolation:
    """Shifts any optimizer's weights by −ζ for a worker's gradient, and restores them bit for bit.

    Inside `with extrapolation.shifted(worker):` the parameters are x_t − ζ^k_t; outside they are
    x_t. The gradient in `.grad` at the end of the block is taken as that worker's. With
    DistributedDataParallel it is a mean: call `remember_local_gradients` before training. Forward
    and backward both belong in the block: a backward pass after it takes the gradient at neither
    point, unless autograd notices and raises. `torch.amp.GradScaler` does not work, since the
    observed gradients would be scaled.

    The optimizer and its extrapolation may be copied together (`copy.deepcopy`, pickle).

    Args:
        optimizer: any `torch.optim.Optimizer` with dense gradients; its learning rates are read at
            every shift.
        direction: the choice of ζ, for example `LocalGradient(ratio=1 / 16)`.
        workers: how many logical workers this process carries, or their numbers.
        seed: for directions that draw noise; the noise is a function of (seed, worker, step).
        unshifted: for each parameter, a tensor in which the caller keeps x_t from before the first
            block of a step until after the update; without it, each block makes that copy.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        direction: Direction,
        workers: int | range = 1,
        seed: int = 0,
        unshifted: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.direction = direction
        self.workers = range(workers) if isinstance(workers, int) else workers
        if len(self.workers) < 1:
            raise ValueError("extrapolation needs at least one worker")
        direction.check_base(optimizer)
        self.seed = seed
        self.steps = 0
        self.parameters: list[Tensor] = [
            p for group in optimizer.param_groups for p in group["params"] if p.requires_grad
        ]
        # By number, since load_state_dict replaces the groups.
        self._groups = [
            i
            for i, group in enumerate(optimizer.param_groups)
            for p in group["params"]
            if p.requires_grad
        ]
        self._base = BaseState(optimizer, self.parameters, self._groups)
        self._unshifted = [
            torch.empty_like(p, requires_grad=False) if unshifted is None else unshifted[p]
            for p in self.parameters
        ]
        self._copies_weights = unshifted is None
        self._weights_are_copied = False
        self._kept = DirectionState(direction, self.parameters, self.workers)
        self._clip_factor: Tensor | None = None
        self._next_clip_factor: Tensor | None = None
        self._inside = False
        self.averaging: Averaging | None = None
        """What `average_with` was given."""
        self._watch_updates()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Whoever kept the weights for the original keeps none for the copy.
        self._copies_weights = True
        # The copy of an optimizer has no hooks.
        self._watch_updates()

    @contextmanager
    def shifted(
        self, worker: int | None = None, *, gradient: Callable[[], object] | None = None
    ) -> Iterator[None]:
        """Hold the weights at x_t − ζ^k_t inside a `with` block.

        Args:
            worker: the worker that takes its gradient; it may be left out if there is only one.
            gradient: for directions of two gradients: a function that leaves the gradient at the
                current weights in `.grad`. It must not change BatchNorm statistics or random
                states.

        Raises:
            ValueError: the worker is not one of `workers`, or `gradient` is missing.
            RuntimeError: the blocks are nested, a gradient is sparse, a whole group had no gradient
                in the block, or parameters were added to the optimizer; or, with
                `remember_local_gradients`, the gradients were not averaged exactly once in the
                block.
        """
        if worker is None:
            if len(self.workers) > 1:
                raise ValueError(
                    f"say whose gradient it is: shifted(worker), with one of {self.workers}"
                )
            worker = self.workers[0]
        if worker not in self.workers:
            raise ValueError(f"worker {worker} is not carried here; carried are {self.workers}")
        if self._inside:
            raise RuntimeError(
                "shifted() blocks cannot be nested: leave the first before entering the next"
            )
        self._require_known_parameters()
        if self.averaging is not None:
            self.averaging.begin_block()
        zeta = self._zeta(worker, gradient)
        self._note_unshifted()
        # From here on the weights are put back whatever happens, even on Ctrl-C.
        try:
            self._inside = True
            with torch.no_grad():
                torch._foreach_sub_(self.parameters, zeta)
            del zeta
            torch.clear_autocast_cache()
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self._unshifted)
            torch.clear_autocast_cache()
            self._inside = False
        self._require_gradients()
        if self._kept.by_worker[worker]:
            observed = self.averaging.end_block() if self.averaging is not None else ()
            self._observe(worker, [i for i in range(len(self.parameters)) if i not in observed])

    def average_with(self, averaging: Averaging, worker: int) -> None:
        """Make this process one worker of several processes that average within a block.

        `averaging` calls `observe_before_average` before each average.

        Raises:
            ValueError: there are several workers.
        """
        if len(self.workers) > 1:
            raise ValueError(
                "a process of DistributedDataParallel is one worker: leave out "
                f"workers={self.workers}"
            )
        self.averaging, self.workers = averaging, range(worker, worker + 1)
        self._kept.belong_to(worker)

    def observe_before_average(self, numbers: Sequence[int]) -> None:
        """Observe `.grad` of some parameters, given by their numbers, before it is averaged.

        Outside a `shifted()` block nothing is observed.
        """
        (worker,) = self.workers
        if self._inside and self._kept.by_worker[worker]:
            self._observe(worker, numbers)

    def note_clipping(self, factor: Tensor | float) -> None:
        """Note the factor (a scalar) by which the mean gradient of this step was clipped.

        Workers' gradients are observed unclipped; the next ζ applies the factor. Call this before
        the optimizer's step wherever gradients are clipped; a step without a call counts as not
        clipped.
        """
        device = self.parameters[0].device
        self._next_clip_factor = torch.as_tensor(factor, device=device).detach().reshape(()).clone()

    def forget(self, worker: int | None = None) -> None:
        """Reset a worker's state, or that of all workers here, to its initial value.

        For a loop that skips updates with a loss or gradient that is not finite: after a shift
        along such a gradient no loss would be finite.
        """
        for k in self.workers if worker is None else [worker]:
            self._kept.forget(k)

    def state_dict(self) -> dict[str, Any]:
        """Return the state; tensors of `worker_state` are [workers, ...], in `workers`' order."""
        return {
            "steps": self.steps,
            "clip_factor": self._clip_factor,
            **self._kept.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, for the same parameters and workers.

        Raises:
            ValueError: the state belongs to other parameters, workers or another direction.
        """
        self._kept.load_state_dict(state)
        self.steps = state["steps"]
        factor = state["clip_factor"]
        self._clip_factor = None if factor is None else factor.to(self.parameters[0].device)

    def _watch_updates(self) -> None:
        self.optimizer.register_step_pre_hook(self._begin_update)
        self.optimizer.register_step_post_hook(self._end_update)

    def _zeta(self, worker: int, gradient: Callable[[], object] | None) -> list[Tensor]:
        second = self._second_gradient(gradient) if self.direction.gradients == 2 else []
        with torch.no_grad():
            return self.direction.zeta(
                Point(
                    worker=worker,
                    step=self.steps,
                    parameters=list(self.parameters),
                    learning_rates=[
                        float(self.optimizer.param_groups[i]["lr"]) for i in self._groups
                    ],
                    state=self._kept.by_worker[worker],
                    shared=self._kept.shared,
                    second_gradient=second,
                    clip_factor=self._clip_factor,
                    base=self._base,
                    seed=self.seed,
                )
            )

    def _second_gradient(self, gradient: Callable[[], object] | None) -> list[Tensor]:
        """Return a copy of the gradient that the function computes at x_t, and set `.grad` to 0."""
        if gradient is None:
            raise ValueError(
                "this direction takes a second gradient: pass shifted(..., gradient=function)"
            )
        gradient()
        if self.averaging is not None:
            self.averaging.end_second_gradient()
        second = [torch.empty_like(p, requires_grad=False) for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(second, self._gradients(range(len(self.parameters))))
            if gradients := [p.grad for p in self.parameters if p.grad is not None]:
                torch._foreach_zero_(gradients)
        return second

    @torch.no_grad()
    def _note_unshifted(self) -> None:
        if self._copies_weights:
            torch._foreach_copy_(self._unshifted, self.parameters)
            self._weights_are_copied = True

    def _require_known_parameters(self) -> None:
        """Raise RuntimeError if the optimizer trains parameters that would not be shifted."""
        known = set(map(id, self.parameters))
        for number, group in enumerate(self.optimizer.param_groups):
            if any(p.requires_grad and id(p) not in known for p in group["params"]):
                raise RuntimeError(
                    f"parameter group {number} has parameters that were added or unfrozen since: "
                    "make a new optimizer and a new Extrapolation"
                )

    def _require_gradients(self) -> None:
        """Raise RuntimeError if a group with trainable parameters has no gradient at all."""
        members = list(zip(self._groups, self.parameters, strict=True))
        empty = {i for i, p in members if p.requires_grad}
        empty -= {i for i, p in members if p.grad is not None}
        if empty:
            raise RuntimeError(
                f"parameter group {min(empty)} has no gradient: backward() belongs inside the block"
            )

    def _gradients(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return `.grad` of the parameters with these numbers, or zero where there is none.

        Raises:
            RuntimeError: one is sparse.
        """
        gradients = [self.parameters[i].grad for i in numbers]
        if any(g is not None and g.layout != torch.strided for g in gradients):
            raise RuntimeError(
                "extrapolation needs dense gradients: use sparse=False in embeddings"
            )
        return [
            # Zeros that take no memory.
            p.new_zeros(()).expand_as(p) if g is None else g
            for g, p in zip(gradients, (self.parameters[i] for i in numbers), strict=True)
        ]

    @torch.no_grad()
    def _observe(self, worker: int, numbers: Sequence[int]) -> None:
        gradients = self._gradients(numbers)
        if gradients:
            self.direction.observe_gradient(self._kept.of_parameters(worker, numbers), gradients)

    @torch.no_grad()
    def _begin_update(
        self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._inside:
            raise RuntimeError(
                "optimizer.step() belongs after the shifted() block, where the weights are x again"
            )
        if self._kept.shared:
            # Before the update, since torch's SGD overwrites the gradients.
            if any(callable(value) for value in (*args, *kwargs.values())):
                raise RuntimeError(
                    "the direction must see the mean gradient before the update: call step() "
                    "without a closure"
                )
            mean = self._gradients(range(len(self.parameters)))
            self.direction.observe_mean_gradient(self._kept.shared, mean)
            if not self._weights_are_copied:
                self._note_unshifted()
        self._clip_factor, self._next_clip_factor = self._next_clip_factor, None
        self.steps += 1

    @torch.no_grad()
    def _end_update(self, *_: object) -> None:
        if self._kept.shared:
            self.direction.observe_update(self._kept.shared, self._unshifted, self.parameters)
        self._weights_are_copied = False
