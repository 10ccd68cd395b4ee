"""The extrapolation framework: take the gradient at x − ζ, make the update from x.

Lin, Kong, Stich, Jaggi: Extrapolation for Large-batch Training in Deep Learning, ICML 2020, arXiv
2006.05720.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from egtrain.optim.base_state import BaseState, require_momentum
from egtrain.optim.randomness import generator_for

Need = Literal["own", "mean", "fresh", "momentum"]


@dataclass(frozen=True)
class Point:
    """What a direction may look at when worker k extrapolates at step t; every list has one tensor
    a parameter.
    """

    parameters: list[Tensor]
    """The unshifted weights."""
    learning_rates: list[float]
    """γ_t of each parameter's group."""
    own: list[Tensor]
    """g^k_{t−1}, the worker's previous gradient, not clipped; zero before its first."""
    clip_factor: Tensor | None
    """What ḡ_{t−1} was multiplied by (a scalar tensor), and g^k_{t−1} has to be; None where nothing
    was clipped."""
    mean: list[Tensor]
    """ḡ_{t−1}, the gradient of the previous update; zero before the first."""
    fresh: list[Tensor]
    """∇f^k(x_t), the gradient at the unshifted weights."""
    base: BaseState
    """What the base optimizer keeps: its momentum, and how it scales a gradient."""
    generator: Callable[[], torch.Generator]
    """Makes the generator of this (seed, worker, step)."""


class Direction(Protocol):
    """A choice of ζ: one row of the table of variants."""

    needs: ClassVar[frozenset[Need]]
    """What of `Point` it looks at, beside weights, rates and noise."""

    def zeta(self, at: Point) -> list[Tensor]:
        """Return ζ, one tensor a parameter, newly allocated."""
        ...


class Extrapolation:
    """Shifts the weights of any optimizer by −ζ while a worker takes its gradient, and puts them
    back bit for bit.

    Inside `with extrapolation.shifted(worker):` the parameters are x_t − ζ^k_t; outside they are
    the optimizer's own. The gradient that `.grad` holds when the block ends is remembered as that
    worker's (with DistributedDataParallel that is a mean: call `remember_local_gradients` before
    training). Forward and backward both belong in the block (a backward pass after it takes the
    gradient at neither point, unless autograd notices and raises). Not with `torch.amp.GradScaler`,
    whose scale the remembered gradients would have.

    A copy (`copy.deepcopy`, pickle) of the optimizer together with its extrapolation works on its
    own.

    Args:
        optimizer: any `torch.optim.Optimizer` with dense gradients; its learning rates are read at
            every shift.
        direction: the choice of ζ, for example `LocalGradient(ratio=1 / 16)`.
        workers: how many logical workers this process carries, or their numbers.
        seed: seed of the directions that draw noise; the noise is a function of (seed, worker,
            step).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        direction: Direction,
        workers: int | range = 1,
        seed: int = 0,
    ) -> None:
        self.optimizer = optimizer
        self.direction = direction
        self.workers = range(workers) if isinstance(workers, int) else workers
        if len(self.workers) < 1:
            raise ValueError("extrapolation needs at least one worker")
        if "momentum" in direction.needs:
            require_momentum(optimizer)
        self.seed = seed
        self.steps = 0
        self._parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.requires_grad
        ]
        # By number: load_state_dict replaces the groups. Which parameters take part is settled
        # here.
        self._groups = [
            i
            for i, group in enumerate(optimizer.param_groups)
            for p in group["params"]
            if p.requires_grad
        ]
        self._base = BaseState(optimizer, self._parameters, self._groups)
        self._unshifted = [torch.empty_like(p, requires_grad=False) for p in self._parameters]
        self._own = {k: self._zeros() for k in self.workers} if "own" in direction.needs else {}
        self._mean = self._zeros() if "mean" in direction.needs else []
        self._clip_factor: Tensor | None = None
        self._next_clip_factor: Tensor | None = None
        self._inside = False
        # Where .grad is a mean by the end of a block, a hook has brought the gradients of these
        # parameters before.
        self._hooked = False
        self._arrivals: Counter[int] = Counter()
        optimizer.register_step_pre_hook(self._begin_update)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The copy of an optimizer has no hooks.
        self.optimizer.register_step_pre_hook(self._begin_update)

    @contextmanager
    def shifted(
        self, worker: int | None = None, *, gradient: Callable[[], object] | None = None
    ) -> Iterator[None]:
        """Hold the weights at x_t − ζ^k_t for the length of a `with` block.

        Args:
            worker: whose past gradient and noise are used, and whose gradient is remembered; where
                there is only one, it need not be named.
            gradient: for directions that need a second gradient ("fresh"): a function that leaves
                the gradient at the current weights in `.grad`. It must leave BatchNorm statistics
                and random streams alone.

        Raises:
            ValueError: the worker is not one of `workers`, or `gradient` is missing.
            RuntimeError: the blocks are nested, a gradient is sparse, a whole group had no gradient
                in the block, or the optimizer got further parameters; or, with
                `remember_local_gradients`, the gradients were not averaged once in the block.
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
        self._arrivals.clear()
        zeta = self._zeta(worker, gradient)
        with torch.no_grad():
            torch._foreach_copy_(self._unshifted, self._parameters)
        # From here on, whatever happens, a Ctrl-C among it, the weights are put back.
        try:
            self._inside = True
            with torch.no_grad():
                torch._foreach_sub_(self._parameters, zeta)
            del zeta
            torch.clear_autocast_cache()
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, self._unshifted)
            torch.clear_autocast_cache()
            self._inside = False
        self._require_gradients()
        if "own" in self.direction.needs:
            self._require_one_arrival()
            self._copy_gradients(
                self._own[worker],
                [i for i in range(len(self._parameters)) if i not in self._arrivals],
            )

    def take_before_average(self, parameters: Iterable[Tensor], worker: int) -> None:
        """Be this one worker, whose gradients of these parameters are told to `remember_gradients`
        by a hook.

        Raises:
            ValueError: there are several workers, or the optimizer has none of the parameters.
        """
        if len(self.workers) > 1:
            raise ValueError(
                "a process of DistributedDataParallel is one worker: leave out "
                f"workers={self.workers}"
            )
        if set(parameters).isdisjoint(self._parameters):
            raise ValueError(
                "the optimizer has none of the model's parameters: make it from model.parameters()"
            )
        self._hooked = True
        self.workers = range(worker, worker + 1)
        self._own = dict(zip(self.workers, self._own.values(), strict=False))

    def remember_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Remember the one worker's `.grad` of some parameters, as a hook finds it before it
        becomes a mean.

        Outside a `shifted()` block nothing is remembered.
        """
        given = set(parameters)
        numbers = [i for i, p in enumerate(self._parameters) if p in given]
        self._arrivals.update(numbers)
        if self._inside and self._own:
            self._copy_gradients(self._own[self.workers[0]], numbers)

    def note_clipping(self, factor: Tensor | float) -> None:
        """Tell by which factor (a scalar) the mean gradient of this step was clipped.

        Past gradients are kept unclipped; ζ takes the factor of the step that they came from. Call
        it before the optimizer's step wherever gradients are clipped; a step without a call is one
        that was not clipped.
        """
        device = self._parameters[0].device
        self._next_clip_factor = torch.as_tensor(factor, device=device).detach().reshape(()).clone()

    def forget(self, worker: int | None = None) -> None:
        """Take a worker's past gradient (or that of all workers here) to be zero, as it is before
        the first.

        For a loop that skips an update whose loss or gradient is not finite: shifted along such a
        gradient, no later loss would be finite.
        """
        for k in self.workers if worker is None else [worker]:
            for past in self._own.get(k, []):
                past.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the state; `own` stacks the workers along dimension 0 of each parameter, in the
        order of `workers`.
        """
        return {
            "steps": self.steps,
            "workers": list(self.workers),
            "clip_factor": self._clip_factor,
            "own": [torch.stack(rows) for rows in zip(*self._own.values(), strict=True)],
            "mean": [m.clone() for m in self._mean],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, for the same parameters and workers.

        Raises:
            ValueError: the state belongs to other parameters, workers or another direction.
        """
        if self._own and state["workers"] != list(self.workers):
            raise ValueError(
                f"the extrapolation state is that of the workers {state['workers']}, and carried "
                "here are "
                f"{list(self.workers)}: every process loads what it has saved itself"
            )
        own = [torch.stack(rows) for rows in zip(*self._own.values(), strict=True)]
        if [m.shape for m in (*own, *self._mean)] != [
            m.shape for m in (*state["own"], *state["mean"])
        ]:
            raise ValueError(
                "the extrapolation state belongs to other parameters, workers or another direction"
            )
        self.steps = state["steps"]
        factor = state["clip_factor"]
        self._clip_factor = None if factor is None else factor.to(self._parameters[0].device)
        for row, gradients in enumerate(self._own.values()):
            torch._foreach_copy_(gradients, [stacked[row] for stacked in state["own"]])
        if self._mean:
            torch._foreach_copy_(self._mean, state["mean"])

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros_like(p, requires_grad=False) for p in self._parameters]

    def _zeta(self, worker: int, gradient: Callable[[], object] | None) -> list[Tensor]:
        fresh: list[Tensor] = []
        if "fresh" in self.direction.needs:
            if gradient is None:
                raise ValueError(
                    "this direction takes a second gradient: pass shifted(..., gradient=function)"
                )
            gradient()
            if self._arrivals:
                raise RuntimeError(
                    "the second gradient was averaged: take it, forward too, within model.no_sync()"
                )
            fresh = self._zeros()
            self._copy_gradients(fresh)
            if gradients := [p.grad for p in self._parameters if p.grad is not None]:
                torch._foreach_zero_(gradients)
        rates = [float(self.optimizer.param_groups[i]["lr"]) for i in self._groups]
        with torch.no_grad():
            return self.direction.zeta(
                Point(
                    parameters=list(self._parameters),
                    learning_rates=rates,
                    own=self._own.get(worker, []),
                    clip_factor=self._clip_factor,
                    mean=self._mean,
                    fresh=fresh,
                    base=self._base,
                    generator=lambda: generator_for(
                        self.seed,
                        "extrapolation",
                        worker,
                        self.steps,
                        device=self._parameters[0].device,
                    ),
                )
            )

    def _require_known_parameters(self) -> None:
        """Raise RuntimeError where the optimizer trains parameters that would not be shifted."""
        known = set(map(id, self._parameters))
        for number, group in enumerate(self.optimizer.param_groups):
            if any(p.requires_grad and id(p) not in known for p in group["params"]):
                raise RuntimeError(
                    f"parameter group {number} has parameters that were added or unfrozen since: "
                    "make a new optimizer and Extrapolation for them"
                )

    def _require_gradients(self) -> None:
        """Raise RuntimeError for a parameter group in which a gradient was possible and there is
        none.
        """
        empty = {i for i, p in zip(self._groups, self._parameters, strict=True) if p.requires_grad}
        empty -= {
            i for i, p in zip(self._groups, self._parameters, strict=True) if p.grad is not None
        }
        if empty:
            raise RuntimeError(
                f"parameter group {min(empty)} has no gradient: backward() belongs inside the block"
            )

    def _require_one_arrival(self) -> None:
        """Raise RuntimeError where a hook should have brought each gradient of the block once, and
        has not.
        """
        if self._hooked and not self._arrivals:
            raise RuntimeError(
                "no gradient was averaged in the block: forward and backward belong in it, the "
                "last micro-batch's "
                "outside of model.no_sync()"
            )
        if self._hooked and max(self._arrivals.values()) > 1:
            raise RuntimeError(
                "gradients were averaged more than once in the block: take all micro-batches but "
                "the last within "
                "model.no_sync(), forward too"
            )

    def _copy_gradients(self, into: list[Tensor], numbers: Sequence[int] | None = None) -> None:
        """Copy `.grad` of every parameter, or of those with these numbers; where there is none it
        is zero.
        """
        if numbers is None:
            numbers = range(len(self._parameters))
        gradients = [self._parameters[i].grad for i in numbers]
        if any(g is not None and g.layout != torch.strided for g in gradients):
            raise RuntimeError(
                "extrapolation needs dense gradients: use sparse=False in embeddings"
            )
        copies = [into[i] for i in numbers]
        with torch.no_grad():
            if copies and all(g is not None for g in gradients):
                torch._foreach_copy_(copies, [g for g in gradients if g is not None])
                return
            for kept, g in zip(copies, gradients, strict=True):
                kept.zero_() if g is None else kept.copy_(g)

    def _begin_update(
        self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._inside:
            raise RuntimeError(
                "optimizer.step() belongs after the shifted() block, where the weights are x again"
            )
        if "mean" in self.direction.needs:
            # Not after the update: torch's SGD makes its step in the memory of the gradients.
            if any(callable(value) for value in (*args, *kwargs.values())):
                raise RuntimeError(
                    "extrapolation along the mean gradient has to see it before the update: "
                    "call step() without a closure"
                )
            self._copy_gradients(self._mean)
        self._clip_factor, self._next_clip_factor = self._next_clip_factor, None
        self.steps += 1
