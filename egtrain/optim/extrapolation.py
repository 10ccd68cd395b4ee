"""The extrapolation framework: take the gradient at x − ζ, make the update from x.

Lin, Kong, Stich, Jaggi: Extrapolation for Large-batch Training in Deep Learning, ICML 2020
(arXiv 2006.05720).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from egtrain.optim.base_state import BaseState
from egtrain.optim.ddp import (
    AveragedByDDP,
    models_in,
    not_watched,
    rank_in,
    refuse_averaging,
    second_gradient_averaged,
)
from egtrain.optim.direction import Direction, Point
from egtrain.optim.direction_state import DirectionState
from egtrain.optim.fsdp import require_one_worker
from egtrain.optim.processes import process_count
from egtrain.optim.remembering import OneBlockEach, OneWorker, Remembering
from egtrain.optim.several_workers import SeveralWorkers
from egtrain.optim.sharded import copy_all
from egtrain.optim.shifting import Weights, forget_what_was_made_of_weights
from egtrain.optim.trained import Trained
from egtrain.optim.updates import Updates
from egtrain.optim.wrappers import unwrapped


class Extrapolation:
    """Shifts any optimizer's weights by −ζ for a worker's gradient, and restores them bit for bit.

    Inside `with extrapolation.shifted(worker):` the parameters are x_t − ζ^k_t; outside they are
    x_t. Forward and backward both belong in the block: a backward pass after it takes the gradient
    at neither point, unless autograd notices and raises. All blocks before one `step()` of the
    optimizer belong to one update: a worker has the same ζ in each of its blocks, and remembers the
    gradient of the whole update. An update that is left out is as if it had not begun.

    Clip, scale and unscale gradients as you like: what a worker remembers is clipped with them.

    The optimizer and its extrapolation may be copied together (`copy.deepcopy`, pickle).

    Args:
        optimizer: any `torch.optim.Optimizer` with dense gradients; its learning rates are read at
            every shift. Parameters that are added or unfrozen later are taken up with fresh state.
        direction: the choice of ζ, for example `LocalGradient(ratio=1 / 16)`.
        workers: how many logical workers there are, all in this process. Or the numbers of those
            in this process, in a loop of several processes that averages gradients itself; it calls
            `averaged()`. By default one.
        seed: for directions that draw noise; the noise is a function of (seed, worker, step).
        unshifted: for each parameter, a tensor in which the caller keeps x_t from before the first
            block of a step until after the update. Such a caller sets `.grad` to zero before each
            block, takes one block a worker and update, and calls `averaged()`. Without it, each
            block copies the weights.
        model: the model, or several, in a loop with `DistributedDataParallel`. Each process is then
            the worker with the number of its rank, and remembers its own gradient, not the mean. Or
            the model that `fully_shard` has sharded: all processes are then one worker together.

    Raises:
        ValueError: there is no worker, the direction is not defined for this optimizer or for
            sharded parameters, or `model` is not the optimizer's or not wrapped.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        direction: Direction,
        workers: int | range | None = None,
        seed: int = 0,
        unshifted: Mapping[Tensor, Tensor] | None = None,
        *,
        model: nn.Module | Sequence[nn.Module] | None = None,
    ) -> None:
        self.optimizer = unwrapped(optimizer)
        self.seed = seed
        direction.check_base(self.optimizer)
        self._trained = Trained(self.optimizer)
        models = [] if model is None else [model] if isinstance(model, nn.Module) else list(model)
        sharded = require_one_worker(self.parameters, direction, workers, models)
        wrapped = [] if sharded else models_in(models)
        if wrapped and workers is not None:
            raise ValueError(
                f"a process of DistributedDataParallel is one worker: leave out workers={workers}"
            )
        self._worker_is_given = workers is not None or sharded or bool(wrapped)
        if wrapped:
            workers = range(rank_in(wrapped[0]), rank_in(wrapped[0]) + 1)
        self.workers = range(1) if workers is None else as_range(workers)
        if len(self.workers) < 1:
            raise ValueError("extrapolation needs at least one worker")
        self._kept = DirectionState(direction, self.parameters, self.workers)
        others = isinstance(workers, range)
        self._remembering = self._of_this_loop(unshifted is not None, others, wrapped)
        self._weights = Weights(self._trained, unshifted, models if sharded else [])
        self._updates = Updates(
            self.optimizer, self._trained, self._kept, self._remembering, self._weights
        )

    @property
    def direction(self) -> Direction:
        """The choice of ζ. Another of the same class may be set between updates, as a schedule.

        Raises:
            ValueError: it is of another class, or not defined for this optimizer.
        """
        return self._kept.direction

    @direction.setter
    def direction(self, direction: Direction) -> None:
        if type(direction) is not type(self.direction):
            raise ValueError(
                f"a {type(direction).__name__} has not the state of a "
                f"{type(self.direction).__name__}: make a new Extrapolation"
            )
        direction.check_base(self.optimizer)
        self._kept.direction = direction

    @property
    def parameters(self) -> list[Tensor]:
        """The shifted parameters: those of the optimizer that require a gradient."""
        return self._trained.parameters

    @property
    def steps(self) -> int:
        """The number of updates made so far."""
        return self._updates.steps

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
            RuntimeError: the blocks are nested, a gradient is sparse, there is no gradient at the
                end of the block, or the weights were changed or parameters unfrozen in it; or, with
                several processes, the worker's own gradient cannot be told.
        """
        worker = self._known(worker)
        if self._updates.inside_block:
            raise RuntimeError(
                "shifted() blocks cannot be nested: leave the first before entering the next"
            )
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "no gradient is taken in inference mode: leave torch.inference_mode() before the "
                "shifted() block"
            )
        self._follow_parameters()
        if not self.parameters:
            raise RuntimeError(
                "no parameter of the optimizer requires a gradient: unfreeze some before the "
                "shifted() block"
            )
        unwatched = self._require_own_gradient()
        self._remembering.begin_block(worker)
        try:
            with self._weights.shifted_by(self._zeta(worker, gradient)):
                self._updates.inside_block = True
                yield
                if all(p.grad is None for p in self.parameters):
                    raise RuntimeError(
                        "no parameter has a gradient: backward() belongs inside the block"
                    )
                if self._trained.has_missed_gradient():
                    raise RuntimeError(
                        "a parameter was added or unfrozen in the shifted() block, so it was not "
                        "shifted: do that before the block"
                    )
        except BaseException:
            self._remembering.leave_block()
            raise
        finally:
            self._updates.inside_block = False
            if unwatched is not None:
                unwatched.remove()
        self._remembering.end_block(worker)
        self._updates.end_block()

    def step(self, closure: Callable[[], Any]) -> Any:
        """Make the optimizer's step with a closure, as L-BFGS needs, each call of it in a block.

        The weights move within such a step, and ζ stays. What is remembered is the gradient of the
        closure's last call.

        Args:
            closure: computes the gradient and returns the loss.

        Returns:
            What the optimizer's step returns.
        """

        def shifted_closure() -> Any:
            with self.shifted(gradient=closure):
                return closure()

        return self.optimizer.step(shifted_closure)

    def averaged(self, norm: Tensor | None = None) -> None:
        """Say that `.grad` now is the mean over all workers, in a loop that averages by itself.

        Call it before gradients are clipped. Loops with `model=`, and those with all workers in
        one process, need no call.

        Args:
            norm: that of `.grad`, a scalar, if it is known already.
        """
        if self._kept.has_worker_state:
            self._remembering.averaged(norm)

    def skip_update(self) -> None:
        """Say that the update is left out for which blocks were made.

        Only a loop of several workers needs it. Others just begin the next block.
        """
        self._updates.skip()

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two updates; blocks since the last one are not in it.

        Parameters that were frozen since the last block are in it, so that a loop that freezes them
        for a while, as GANs do, is saved whole, and goes on as if it had not been saved. Tensors of
        `worker_state` are [workers, ...], in `workers`' order.
        """
        if not self._updates.blocks and all(p.requires_grad for p in self.parameters):
            self._follow_parameters()
        names = self._trained.names()
        return {
            "steps": self.steps,
            "clip_factor": self._updates.clip_factor,
            "updated": list(self._updates.updated),
            **({} if names is None else {"parameter_names": names}),
            **self._kept.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, for the same parameters and workers.

        Parameters are matched by name if the optimizer knows their names, and else by their place.

        Raises:
            ValueError: the state belongs to other parameters, workers or another direction.
            RuntimeError: there are several processes, and which worker this one is, is not known.
        """
        self._follow_parameters()
        self._require_known_worker()
        places = self._places_in(state)
        self._updates.skip()
        self._kept.load_state_dict(state, places)
        self._updates.steps = state["steps"]
        self._updates.updated = [state["updated"][i] for i in places]
        factor = state["clip_factor"]
        self._updates.clip_factor = None if factor is None else factor.to(self.parameters[0].device)

    def _of_this_loop(
        self,
        one_block_each: bool,
        others: bool,
        wrapped: Sequence[nn.parallel.DistributedDataParallel],
    ) -> Remembering:
        """Return how the workers' gradients come out of this kind of loop."""
        remember = self._remember if self._kept.has_worker_state else None
        if wrapped and (remember is not None or self.direction.gradients == 2):
            return AveragedByDDP(self._trained, remember, self._kept.forget, wrapped)
        if remember is None:
            return OneWorker(self.workers[0], self._remember)
        if one_block_each:
            return OneBlockEach(self._trained, remember, self._kept.forget)
        if len(self.workers) > 1 or others:
            return SeveralWorkers(self._trained, remember, others)
        return OneWorker(self.workers[0], remember)

    def _known(self, worker: int | None) -> int:
        if worker is None and len(self.workers) > 1:
            raise ValueError(
                f"say whose gradient it is: shifted(worker), with one of {self.workers}"
            )
        worker = self.workers[0] if worker is None else worker
        if worker not in self.workers:
            raise ValueError(f"worker {worker} is not carried here; carried are {self.workers}")
        return worker

    def _follow_parameters(self) -> None:
        """Take up added, frozen and unfrozen parameters, and other types or devices.

        Raises:
            RuntimeError: they have changed between the blocks of one update.
        """
        places = self._trained.refresh(self._remembering.is_amid_update())
        if places is not None:
            require_one_worker(self.parameters, self.direction, 1, self._weights.sharded_models)
            self._kept.follow(self.parameters, places)
            updated = self._updates.updated
            self._updates.updated = [i is not None and updated[i] for i in places]
            if isinstance(self._remembering, AveragedByDDP):
                self._remembering.watch()
        self._kept.follow_types()

    def _require_own_gradient(self) -> Any:
        """Raise RuntimeError if this process would take the mean over the processes for its own.

        Returns:
            None, or a handle to be removed at the end of the first block.
        """
        if not self._kept.has_worker_state or process_count() == 1:
            return None
        self._require_known_worker()
        if (
            self._updates.inside_step
            and self._updates.blocks_in_step
            and isinstance(self._remembering, AveragedByDDP)
        ):
            raise RuntimeError(
                "an optimizer that calls its closure again within a step cannot remember gradients "
                "with DistributedDataParallel: take a direction that does not, such as "
                "OptimisticGradient"
            )
        if self._updates.made_here or isinstance(self._remembering, AveragedByDDP):
            return None
        return refuse_averaging(self.parameters, not_watched, within_no_sync=True)

    def _require_known_worker(self) -> None:
        if self._kept.has_worker_state and not self._worker_is_given and process_count() > 1:
            raise RuntimeError(
                "this direction needs the gradient of each process before the average: pass "
                "Extrapolation(..., model=model) with your DistributedDataParallel, or "
                "workers=range(rank, rank + 1) in a loop that averages by itself"
            )

    def _zeta(self, worker: int, gradient: Callable[[], object] | None) -> list[Tensor]:
        second = self._second_gradient(gradient) if self.direction.gradients == 2 else []
        with torch.no_grad():
            return self.direction.zeta(
                Point(
                    worker=worker if self._worker_is_given or process_count() == 1 else None,
                    step=self.steps,
                    parameters=list(self.parameters),
                    learning_rates=self._trained.learning_rates(),
                    state=self._kept.by_worker[worker],
                    shared=self._kept.shared,
                    second_gradient=second,
                    clip_factor=self._updates.clip_factor,
                    base=BaseState(
                        self.optimizer,
                        self.parameters,
                        self._trained.groups,
                        updates=self.steps,
                        updated=self._updates.updated,
                    ),
                    seed=self.seed,
                )
            )

    def _second_gradient(self, gradient: Callable[[], object] | None) -> list[Tensor]:
        """Return a copy of the gradient that the function computes at x_t.

        In the first block of an update, `.grad` is zero afterwards; in others, it is what it was.
        """
        if gradient is None:
            raise ValueError(
                "this direction takes a second gradient: pass shifted(..., gradient=function)"
            )
        before = [p.grad for p in self.parameters]
        # Whether or not the function zeroes: what was in .grad is no part of its gradient.
        self._set_gradients([None] * len(before))
        forget_what_was_made_of_weights()
        unaware = process_count() > 1 and not isinstance(self._remembering, AveragedByDDP)
        refusal = None
        if unaware and not self._updates.made_here:
            refusal = refuse_averaging(
                self.parameters, second_gradient_averaged, within_no_sync=False
            )
        try:
            gradient()
            self._remembering.end_second_gradient()
            if all(p.grad is None for p in self.parameters):
                raise RuntimeError(
                    "no parameter has a gradient after gradient(): it must leave the second one in "
                    ".grad"
                )
            second = [torch.empty_like(p, requires_grad=False) for p in self.parameters]
            with torch.no_grad():
                copy_all(second, self._trained.gradients())
            if not self._updates.blocks:
                pairs = zip(self.parameters, before, strict=True)
                before = [p.grad if grad is None else grad for p, grad in pairs]
                if gradients := [grad for grad in before if grad is not None]:
                    with torch.no_grad():
                        torch._foreach_zero_(gradients)
        finally:
            self._set_gradients(before)
            if refusal is not None:
                refusal.remove()
        return second

    def _set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient

    @torch.no_grad()
    def _remember(
        self, worker: int, numbers: Sequence[int] | None, gradients: list[Tensor]
    ) -> None:
        if state := self._kept.of_parameters(worker, numbers):
            self.direction.observe_gradient(state, gradients)

    def _places_in(self, state: dict[str, Any]) -> list[int]:
        """Return the place that each parameter has in a saved state.

        Raises:
            ValueError: the state is that of other parameters.
        """
        names, saved = self._trained.names(), state.get("parameter_names")
        if names is None or saved is None:
            if len(state["updated"]) != len(self.parameters):
                raise ValueError(
                    f"the extrapolation state is that of {len(state['updated'])} parameters, but "
                    f"the optimizer trains {len(self.parameters)}"
                )
            return list(range(len(self.parameters)))
        places = {name: place for place, name in enumerate(saved)}
        for name in names:
            if name not in places:
                raise ValueError(f"the extrapolation state has no parameter '{name}'")
        return [places[name] for name in names]


def as_range(workers: int | range) -> range:
    """Return the workers' numbers."""
    return workers if isinstance(workers, range) else range(workers)
