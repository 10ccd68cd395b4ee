"""Which weights of a model are the variables, by their names."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from egtrain.errors import UsageError, did_you_mean

LOW = 4
"""Bytes of the shortest number that is computed with."""


def plain_model(model: nn.Module) -> nn.Module:
    """Return the model inside a wrapper for several devices, which waits for its own backward."""
    return model.module if isinstance(model, DistributedDataParallel | DataParallel) else model


def chosen_names(model: nn.Module, names: Sequence[str] | str | None) -> list[str]:
    """Return the names of the trainable weights to measure over, in the model's order.

    Args:
        model: weights that appear twice in it have one name, the first.
        names: of weights or of modules, whose weights are all taken; None takes all.

    Raises:
        UsageError: nothing is trainable, a name matches nothing trainable, or the weights are of a
            kind that cannot be measured.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in reversed(every.items())}
    trainable = [name for name, p in every.items() if p.requires_grad and p.numel()]
    if names is not None:
        given = [names] if isinstance(names, str) else list(names)
        if not given:
            raise UsageError("names is empty: name weights or modules, or leave it out for all")
        matched = {name: [n for n in trainable if _belongs(n, name)] for name in given}
        for name, found in matched.items():
            if not found:
                raise UsageError(_matches_nothing(name, list(every)))
        trainable = [name for found in matched.values() for name in found]
    wanted = {first[id(every[name])] for name in trainable}
    chosen = [name for name in every if name in wanted]
    if not chosen:
        raise UsageError(
            "the model has no trainable weights: set requires_grad on those to measure over"
        )
    for name in chosen:
        if every[name].is_complex():
            raise UsageError(
                f"{name} is complex, and curvature is that of real weights: leave it out by "
                "names=[...], or store it as real numbers and use torch.view_as_complex"
            )
        if hasattr(every[name], "full_tensor"):
            raise UsageError(
                f"{name} is sharded over processes: measure a model with whole weights, loaded "
                "from a full state dict"
            )
    return chosen


def _belongs(weight: str, name: str) -> bool:
    return weight == name or weight.startswith(f"{name}.")


def _matches_nothing(name: str, every: list[str]) -> str:
    if any(_belongs(weight, name) for weight in every):
        return f"the weights of {name!r} are frozen: set requires_grad on them, or leave it out"
    modules = {weight.rpartition(".")[0] for weight in every} - {""}
    hint = did_you_mean(name, [*every, *sorted(modules)])
    return f"the model has no weights of the name {name!r}{hint or '; see named_parameters()'}"


def computing_type(kept: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Return the type to compute in for numbers that are kept in a type.

    By default floating-point numbers of less than 32 bits become float32: with 8 bits of mantissa,
    a second derivative is mostly rounding, and small steps from the weights change nothing.
    """
    if not kept.is_floating_point:
        return kept
    return wanted or (torch.float32 if kept.itemsize < LOW else kept)
