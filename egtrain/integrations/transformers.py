"""Extrapolation in a Hugging Face `Trainer`: a mixin, which imports nothing of transformers."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from egtrain.integrations.second_gradient import nothing_else_changes, refuse_scaled
from egtrain.integrations.states import load_own, save_own
from egtrain.optim import Direction, Extrapolation


class ExtrapolationMixin:
    """Lets a `Trainer` take its gradients at shifted weights.

    >>> class ExtrapolationTrainer(ExtrapolationMixin, Trainer): ...
    >>> trainer = ExtrapolationTrainer(model, arguments, direction=LocalGradient(ratio=0.5), ...)

    It stands before `Trainer`, or a trainer made from it such as `Seq2SeqTrainer`.

    Args:
        direction: the choice of ζ.
        args: those of the trainer.
        kwargs: those of the trainer.
    """

    extrapolation: Extrapolation | None = None
    """Made at the first training step."""

    def __init__(self, *args: Any, direction: Direction, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.direction = direction
        self._made_for: tuple[Any, nn.Module] | None = None

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward of a micro-batch at shifted weights."""
        trainer: Any = self
        forward_and_backward = partial(super().training_step, model, *args, **kwargs)  # type: ignore[misc]

        def second_gradient() -> None:
            with trainer.accelerator.no_sync(model), nothing_else_changes(model):
                forward_and_backward()

        with self._extrapolation_of(model).shifted(gradient=second_gradient):
            loss: Tensor = forward_and_backward()
        return loss

    def _extrapolation_of(self, model: nn.Module) -> Extrapolation:
        """Return the extrapolation of the optimizer and the wrapped model, made when it is new.

        Raises:
            ValueError: the direction does not work with them, or the parameters are sharded.
        """
        trainer: Any = self
        if self.extrapolation is None or self._made_for != (trainer.optimizer, model):
            kind = trainer.accelerator.distributed_type.value
            if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
                raise ValueError(
                    "ExtrapolationMixin works in one process or with DistributedDataParallel, not "
                    f"with {kind}"
                )
            refuse_scaled(self.direction, trainer.accelerator.scaler)
            self.extrapolation = Extrapolation(
                trainer.optimizer, self.direction, seed=trainer.args.seed, model=model
            )
            self._made_for = trainer.optimizer, model
        return self.extrapolation

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.extrapolation is not None:
            save_own(self.extrapolation, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            trainer: Any = self
            load_own(self._extrapolation_of(trainer.model_wrapped), checkpoint)
