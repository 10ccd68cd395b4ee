"""Weights that are shifted inside a block, and put back bit for bit."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from egtrain.optim.fsdp import drop_gathered_weights
from egtrain.optim.sharded import copy_all, subtract_all
from egtrain.optim.trained import Trained


class Weights:
    """The weights of an optimizer, and their values x_t while they are shifted.

    Args:
        trained: the parameters.
        unshifted: for each parameter, a tensor in which somebody else keeps x_t from before the
            first block until after the update; without it, each block makes that copy.
        sharded_models: those of sharded parameters.
    """

    def __init__(
        self,
        trained: Trained,
        unshifted: Mapping[Tensor, Tensor] | None,
        sharded_models: Sequence[nn.Module],
    ) -> None:
        self._trained = trained
        self.sharded_models = sharded_models
        self._given = unshifted
        self._kept: list[Tensor] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Whoever kept the weights for the original keeps none for the copy.
        self._given = None

    @torch.no_grad()
    def keep(self) -> list[Tensor]:
        """Return x_t: what somebody else keeps, or a copy of the weights in tensors used again."""
        parameters = self._trained.parameters
        if self._given is not None:
            self._kept = [self._given[p] for p in parameters]
            return self._kept
        if not alike(self._kept, parameters):
            self._kept = [torch.empty_like(p, requires_grad=False) for p in parameters]
        copy_all(self._kept, parameters)
        return self._kept

    @contextmanager
    def shifted_by(self, zeta: list[Tensor]) -> Iterator[None]:
        """Subtract ζ from the weights inside the block.

        Raises:
            RuntimeError: the weights were changed inside the block.
        """
        parameters = list(self._trained.parameters)
        kept = self.keep()
        # From here on the weights are put back whatever happens, even on Ctrl-C.
        try:
            with torch.no_grad():
                subtract_all(parameters, zeta)
            del zeta
            forget_what_was_made_of_weights()
            drop_gathered_weights(self.sharded_models)
            versions = [p._version for p in parameters]
            yield
            changed = versions != [p._version for p in parameters]
        finally:
            with torch.no_grad():
                copy_all(parameters, kept)
            forget_what_was_made_of_weights()
            drop_gathered_weights(self.sharded_models)
        if changed:
            raise RuntimeError(
                "the weights were changed in the shifted() block, which puts them back: load a "
                "state, rescale weights as Embedding(max_norm=...) does, or shift them by another "
                "Extrapolation, outside of it"
            )


def alike(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether each tensor has the type, device and shape of the other list's."""
    return len(tensors) == len(others) and all(
        t.dtype == o.dtype and t.device == o.device and t.shape == o.shape
        for t, o in zip(tensors, others, strict=True)
    )


def forget_what_was_made_of_weights() -> None:
    """Clear what autocast and `parametrize.cached()` have computed from the weights."""
    torch.clear_autocast_cache()
    cache: dict[Any, Any] = parametrize._cache
    cache.clear()
