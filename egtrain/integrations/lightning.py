"""Extrapolation in a Lightning `Trainer`: a callback."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from egtrain.integrations.second_gradient import nothing_else_changes, refuse_scaled
from egtrain.integrations.states import gathered, own_part
from egtrain.optim import Direction, Extrapolation

try:
    from lightning.pytorch import Callback
except ImportError:  # the same classes in a package of their own
    from pytorch_lightning import Callback


class ExtrapolationCallback(Callback):  # type: ignore[misc]
    """Lets a Lightning run take its gradients at shifted weights.

    With automatic optimization nothing else is needed. With manual optimization, put forward and
    backward of `training_step` into `with callback.shifted():`.

    Args:
        direction: the choice of ζ.
        seed: for directions that draw noise.
        optimizer: which of several optimizers, by its number; each needs a callback of its own.
    """

    def __init__(self, direction: Direction, seed: int = 0, optimizer: int | None = None) -> None:
        self.direction = direction
        self.seed = seed
        self.optimizer = optimizer
        self.extrapolation: Extrapolation | None = None
        """Made when fitting begins."""
        self._loaded: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """The callback's name in a checkpoint, different for each optimizer."""
        return f"ExtrapolationCallback-{self.optimizer or 0}"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the extrapolation of the module's optimizer.

        Raises:
            ValueError: it is not said which optimizer is meant, the direction does not work with
                it, or the strategy is not one of one process or DistributedDataParallel.
        """
        model = trainer.strategy.model
        if trainer.world_size > 1 and not isinstance(model, DistributedDataParallel):
            raise ValueError(
                "ExtrapolationCallback works in one process or with strategy='ddp', not with "
                f"{type(trainer.strategy).__name__}"
            )
        count = len(trainer.optimizers)
        if self.optimizer is None and count != 1:
            raise ValueError(
                f"the module has {count} optimizers: say whose gradients are taken at shifted "
                "weights, ExtrapolationCallback(..., optimizer=0), with a callback for each"
            )
        refuse_scaled(self.direction, getattr(trainer.precision_plugin, "scaler", None))
        optimizer = trainer.optimizers[self.optimizer or 0]
        self.extrapolation = Extrapolation(optimizer, self.direction, seed=self.seed, model=model)
        if self._loaded:
            self.extrapolation.load_state_dict(own_part(self._loaded))
            self._loaded = {}
        if pl_module.automatic_optimization:
            loop = trainer.fit_loop.epoch_loop.automatic_optimization
            # Of the class: the loop is that of an earlier fit() where the trainer is.
            make_closure = partial(type(loop)._make_closure, loop)
            loop._make_closure = self._shifting(make_closure, trainer, pl_module)

    def shifted(
        self, *, gradient: Callable[[], object] | None = None
    ) -> AbstractContextManager[None]:
        """Return the block for forward and backward in a module with manual optimization.

        Where no gradients are computed, as in validation, it changes nothing.
        """
        if self.extrapolation is None or not torch.is_grad_enabled():
            return nullcontext()
        return self.extrapolation.shifted(gradient=gradient)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all processes on the first one; each has to call it."""
        return {} if self.extrapolation is None else gathered(self.extrapolation.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until fitting begins."""
        self._loaded = state_dict

    def _shifting(
        self, make_closure: Callable[..., Any], trainer: Any, pl_module: Any
    ) -> Callable[..., Any]:
        """Return a maker of closures, each of which is a forward and backward pass, in a block."""
        no_sync = getattr(trainer.strategy, "block_backward_sync", nullcontext)

        def make_shifting_closure(*args: Any) -> Any:
            closure = make_closure(*args)
            forward_and_backward = closure.closure

            def second_gradient() -> None:
                with no_sync(), nothing_else_changes(pl_module):
                    forward_and_backward()

            def in_block(*args: Any, **kwargs: Any) -> Any:
                result = None
                try:
                    with self.shifted(gradient=second_gradient):
                        result = forward_and_backward(*args, **kwargs)
                        if result.closure_loss is None:
                            raise NoLoss
                except NoLoss:
                    pass
                return result

            closure.closure = in_block
            return closure

        return make_shifting_closure


class NoLoss(Exception):
    """`training_step` has returned None, so the block has no gradient."""
