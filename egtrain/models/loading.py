"""Loading saved weights into a model; an error names what does not fit."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from egtrain.errors import UsageError
from egtrain.formatting import counted

SHOWN = 3
"""Names of each kind in a message."""
WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel, DistributedDataParallel and torch.compile put before each name."""


def load_weights(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    source: str = "the checkpoint",
    remedy: str = "undo what changed the model",
    strict: bool = True,
) -> str | None:
    """Copy parameters and buffers by name, into the types of the model.

    Either side may lack BatchNorm's batch counters, and of tied weights one name is enough.

    Args:
        model: changed only if nothing is raised.
        tensors: by name.
        source: what holds them, for messages.
        remedy: ends the error about names and shapes that do not fit.
        strict: whether all must fit; otherwise what fits is copied.

    Returns:
        What does not fit, in words; None if all fits.

    Raises:
        UsageError: something does not fit, or without `strict` nothing does.
    """
    every: dict[str, Tensor] = {
        name: weight
        for name, weight in model.state_dict(keep_vars=True).items()
        if isinstance(weight, Tensor)
    }
    counters = {
        name for name in [*every, *tensors] if name.rpartition(".")[2] == "num_batches_tracked"
    }
    twins: dict[int, list[str]] = {}
    for name, weight in every.items():
        twins.setdefault(id(weight), []).append(name)
    wrong = {name: _misfit(tensors[name], every[name]) for name in every if name in tensors}
    for names in twins.values():
        there = [name for name in names if name in wrong and wrong[name] is None]
        for name in there[1:]:
            if not torch.equal(tensors[name], tensors[there[0]]):
                wrong[name] = f"is not equal to {there[0]!r}, with which the model ties it"
    fitting = [name for name, problem in wrong.items() if problem is None]
    missing = [
        name
        for name in every
        if name not in counters and not any(twin in tensors for twin in twins[id(every[name])])
    ]
    unknown = [name for name in tensors if name not in every and name not in counters]
    problems = [
        _listed("missing", map(repr, missing)),
        _listed("unknown to the model", map(repr, unknown)),
        _listed("of another form", (f"{name!r} {p}" for name, p in wrong.items() if p)),
    ]
    said = "; ".join(problem for problem in problems if problem) or None
    if said is not None and (strict or not fitting):
        raise UsageError(f"{source} has another architecture: {said}; {remedy}")
    with torch.no_grad():
        for name in fitting:
            every[name].copy_(tensors[name])
    return said


def without_wrappers(tensors: Mapping[str, Tensor], known: Sequence[str]) -> dict[str, Tensor]:
    """Return tensors without the prefixes of wrappers, where all names have one and none is known.

    `known` has the model's own names.
    """
    found = dict(tensors)
    while found and not any(name in known for name in found):
        prefix = next((p for p in WRAPPERS if all(name.startswith(p) for name in found)), None)
        if prefix is None:
            break
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def _misfit(tensor: Tensor, weight: Tensor) -> str | None:
    if tensor.shape != weight.shape:
        return f"has shape {list(tensor.shape)}, the model's {list(weight.shape)}"
    if _kind(tensor) != _kind(weight):
        return f"holds {_kind(tensor)} numbers, the model's {_kind(weight)} ones"
    return None


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "whole"


def _listed(what: str, named: Iterable[str]) -> str:
    """Return a count with the first ones; nothing if there are none."""
    items = list(named)
    if not items:
        return ""
    more = [f"and {len(items) - SHOWN:,} more"] if len(items) > SHOWN else []
    return f"{counted(len(items), 'weight')} {what} ({', '.join([*items[:SHOWN], *more])})"
