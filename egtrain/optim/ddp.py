"""Extrapolation in a loop with `DistributedDataParallel`: every process is one worker."""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from egtrain.optim.processes import process_count
from egtrain.optim.remembering import Remember, shrinkage, version_of, versions
from egtrain.optim.trained import Trained


def models_in(models: Sequence[nn.Module]) -> list[DistributedDataParallel]:
    """Return the wrapped models, also where torch.compile has wrapped them once more.

    In a loop of one process the models need not be wrapped: there the list is empty.

    Raises:
        ValueError: a model is not a DistributedDataParallel, in a loop of several processes.
    """
    models = [getattr(m, "_orig_mod", m) for m in models]
    wrapped = [m for m in models if isinstance(m, DistributedDataParallel)]
    if process_count() > 1 and len(wrapped) < len(models):
        other = next(m for m in models if not isinstance(m, DistributedDataParallel))
        raise ValueError(
            f"model= takes a DistributedDataParallel, not a {type(other).__name__}: wrap the model "
            "first"
        )
    return wrapped


def rank_in(model: DistributedDataParallel) -> int:
    """Return the rank of this process among those that share the model."""
    return torch.distributed.get_rank(model.process_group)


class AveragedByDDP:
    """The worker of this process: its gradient before DDP averages it, at the backward pass.

    The backward pass calls a hook after it has added a parameter's gradient to `.grad`, and before
    DDP puts `.grad` into a bucket to be reduced. So any communication hook may be in use.

    Args:
        trained: the parameters.
        remember: lets the worker remember gradients; None if the direction needs none.
        forget_past: resets what the worker remembers.
        models: the wrapped models.

    Raises:
        ValueError: the optimizer has none of a model's parameters.
    """

    def __init__(
        self,
        trained: Trained,
        remember: Remember | None,
        forget_past: Callable[[Tensor | None], None],
        models: Sequence[DistributedDataParallel],
    ) -> None:
        self.worker = rank_in(models[0])
        self._trained = trained
        self._remember = remember
        self._forget_past = forget_past
        # Weak, so that a model and its processes' connections go when the caller lets them go.
        self._models = [weakref.ref(model) for model in models]
        self._averages: list[bool | None] = [True] * len(models)
        """Whether each model averages at the backward pass of its last forward pass; None while
        that forward pass is under way."""
        for i, model in enumerate(models):
            model.register_forward_pre_hook(forward_hook(weakref.ref(self), i, begins=True))
            model.register_forward_hook(forward_hook(weakref.ref(self), i, begins=False))
        self._inside = False
        self._averaged = False
        self._arrivals: Counter[int] = Counter()
        """How often the gradients with these places were averaged in the block."""
        self._waiting: set[int] = set()
        """Those with a gradient since the last update that was not averaged yet."""
        self._last: list[tuple[Tensor | None, int]] = []
        """`.grad` and its version when it was averaged, until an update."""
        self._twice = False
        self._norm: Tensor | None = None
        """That of the mean gradient, before anything is done to it."""
        self._norm_is_due = False
        self._watched: dict[int, tuple[int, int]] = {}
        """For each watched parameter, by its id, its place and that of its model."""
        self.watch()
        for i in range(len(models)):
            if all(of != i for _, of in self._watched.values()):
                raise ValueError(
                    "the optimizer has none of the model's parameters: make it from "
                    "model.parameters()"
                )

    def watch(self) -> None:
        """Watch the gradients of all parameters that are trained now."""
        hook = arrival_hook(weakref.ref(self))
        places = {id(p): i for i, p in enumerate(self._trained.parameters)}
        watched = {}
        for i, reference in enumerate(self._models):
            model = reference()
            for p in model.parameters() if model is not None else ():
                if id(p) in places:
                    watched[id(p)] = places[id(p)], i
                    if id(p) not in self._watched:
                        p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        self._watched = watched
        self._last = []

    def begin_block(self, worker: int) -> None:
        """Begin a block.

        After a gradient was averaged, it begins the update anew: the one before was left out, as
        `torch.amp.GradScaler` does after an overflow, and its gradient is forgotten.
        """
        self._arrivals.clear()
        self._norm_is_due = False
        if self._averaged:
            last = self._last
            self.skip()
            self._last = last
        self._inside = True

    def forward_pass(self, i: int, model: DistributedDataParallel, begins: bool) -> None:
        """Note whether DDP averages at the backward pass: not if this was within no_sync()."""
        if torch.is_grad_enabled():
            self._averages[i] = None if begins else model.require_backward_grad_sync

    def _averages_now(self, i: int) -> bool:
        """Return whether this backward pass is to be averaged."""
        averages, model = self._averages[i], self._models[i]()
        if averages is None and model is not None:
            # Within the forward pass, as in Lightning's manual optimization, which has set this.
            averages = model.require_forward_param_sync
        return bool(averages)

    def arrive(self, p: Tensor) -> None:
        """Remember the gradient of a parameter, if this backward pass is to average it."""
        if not self._inside or id(p) not in self._watched:
            return
        place, model = self._watched[id(p)]
        if self._last:
            # Neither replaced nor zeroed in place, which is one change more than the addition.
            averaged, version = self._last[place]
            self._twice |= p.grad is averaged and version_of(p.grad) == version + 1
        if not self._averages_now(model):
            self._waiting.add(place)
            return
        self._arrivals[place] += 1
        self._waiting.discard(place)
        if self._remember is not None:
            self._remember(self.worker, [place], self._trained.gradients([place]))
            if not self._norm_is_due:
                self._norm_is_due = True
                call_after_backward(self._wait_for_average)

    def _wait_for_average(self) -> None:
        # DDP has asked to be called by now, and comes before those that ask from here on.
        call_after_backward(self._note_norm)

    @torch.no_grad()
    def _note_norm(self) -> None:
        self._norm, self._norm_is_due = self._trained.norm(), False

    def end_second_gradient(self) -> None:
        """Raise RuntimeError if the second gradient was averaged."""
        if self._arrivals:
            raise second_gradient_averaged()
        self._waiting.clear()

    def end_block(self, worker: int) -> None:
        """Remember the gradients that no backward pass has brought, if there is a mean.

        Raises:
            RuntimeError: gradients were averaged twice in this update, or no backward pass was in
                the block.
        """
        self._inside = False
        if self._last:  # where this block has added nothing, the average before must be gone
            self._twice |= any(
                p.grad is not None and p.grad is averaged and version_of(averaged) == version
                for p, (averaged, version) in zip(self._trained.parameters, self._last, strict=True)
            )
        if self._twice or max(self._arrivals.values(), default=0) > 1:
            self.skip()
            raise RuntimeError(
                "gradients were averaged more than once in an update: take all micro-batches but "
                "the last within model.no_sync(), forward too"
            )
        if not self._arrivals and not self._waiting:
            raise RuntimeError("no gradient came in the block: forward and backward belong in it")
        if not self._arrivals:
            return
        self._averaged = True
        self._last = versions(self._trained.parameters)
        if self._remember is not None:
            self._remember_the_rest(self._remember)

    def leave_block(self) -> None:
        """Leave a block that an exception has ended, and that may have overwritten the past."""
        self._inside = False
        self._averaged |= bool(self._arrivals)

    def averaged(self, norm: Tensor | None) -> None:
        """Accept it: DDP has averaged already."""

    def clip_factor(self) -> Tensor | None:
        """Return the factor by which the mean gradient was clipped.

        Raises:
            RuntimeError: the gradients of this update's blocks were not averaged.
        """
        if self._waiting and not self._averaged:
            raise RuntimeError(
                "no gradient was averaged before the update: take the last micro-batch outside of "
                "model.no_sync(), forward too"
            )
        return None if self._norm is None else shrinkage(self._norm, self._trained)

    def remember(self, gradients: list[Tensor]) -> None:
        """Begin the next update: the gradients have been remembered at the backward pass."""
        self._begin_update()

    def skip(self) -> None:
        """Drop the blocks since the last update, and the past if it was overwritten in them."""
        if self._averaged:
            self._forget_past(None)
        self._begin_update()

    def leave_out_where(self, overflow: Tensor | None) -> None:
        """Forget the past, which was overwritten at the backward pass."""
        if overflow is not None and self._remember is not None:
            self._forget_past(overflow)

    def is_amid_update(self) -> bool:
        """Return whether there were blocks, and no average yet."""
        return bool(self._waiting) and not self._averaged

    def _begin_update(self) -> None:
        self._averaged = self._twice = False
        self._last, self._norm = [], None
        self._waiting.clear()

    def _remember_the_rest(self, remember: Remember) -> None:
        """Remember gradients that did not arrive.

        Raises:
            RuntimeError: one is unknown.
        """
        late = {place for place, _ in self._watched.values()} - self._arrivals.keys()
        if late & self._waiting:
            raise RuntimeError(
                f"parameter {min(late & self._waiting)} got a gradient in an earlier micro-batch "
                "of the update and none in the last, so this process's own can no longer be told: "
                "use the same parameters in all of them"
            )
        for place in sorted(late):  # no gradient here, whatever other processes had
            zero = torch.zeros_like(self._trained.parameters[place])
            remember(self.worker, [place], [zero])
        known = {place for place, _ in self._watched.values()}
        if others := [i for i in range(len(self._trained.parameters)) if i not in known]:
            remember(self.worker, others, self._trained.gradients(others))


def arrival_hook(reference: "weakref.ref[AveragedByDDP]") -> Callable[[Tensor], None]:
    """Return a hook that does nothing once its extrapolation is gone."""

    def arrive(p: Tensor) -> None:
        gradients = reference()
        if gradients is not None:
            gradients.arrive(p)

    return arrive


def call_after_backward(function: Callable[[], None]) -> None:
    """Call a function at the end of the backward pass that is under way."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def forward_hook(
    reference: "weakref.ref[AveragedByDDP]", i: int, begins: bool
) -> Callable[..., None]:
    """Return a hook of the model with this place, which does nothing once its owner is gone."""

    def forward_pass(model: nn.Module, *_: object) -> None:
        gradients = reference()
        if gradients is not None and isinstance(model, DistributedDataParallel):
            gradients.forward_pass(i, model, begins)

    return forward_pass


def refuse_averaging(
    parameters: Sequence[Tensor], error: Callable[[], RuntimeError], within_no_sync: bool
) -> Any:
    """Return a handle, to be removed, that refuses DDP around these parameters at its forward pass.

    Args:
        parameters: a model with none of them may be used.
        error: makes what is raised.
        within_no_sync: whether to refuse it also where it averages no gradient: within no_sync(),
            or where none is taken.
    """
    ours = set(map(id, parameters))

    def refuse(module: nn.Module, _: Any) -> None:
        if (
            isinstance(module, DistributedDataParallel)
            and (within_no_sync or (module.require_backward_grad_sync and torch.is_grad_enabled()))
            and torch.distributed.get_world_size(module.process_group) > 1
            and not ours.isdisjoint(map(id, module.parameters()))
        ):
            raise error()

    return nn.modules.module.register_module_forward_pre_hook(refuse)


def not_watched() -> RuntimeError:
    """Return the error of a process that would take the mean for its own gradient."""
    return RuntimeError(
        "this direction needs the process's gradient before DistributedDataParallel "
        "averages it: pass Extrapolation(..., model=model)"
    )


def second_gradient_averaged() -> RuntimeError:
    """Return the error of a second gradient that DDP averages, which is the process's own."""
    return RuntimeError(
        "the second gradient was averaged: take it, forward too, within model.no_sync()"
    )
