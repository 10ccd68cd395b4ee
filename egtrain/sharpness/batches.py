"""A user's data as batches that are read once, with the number of samples of each."""

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from egtrain.errors import UsageError
from egtrain.nested import tensors_in, with_tensors

NUMBERS = "give pairs (batch, number of samples) to FrozenLoss(model, loss_function, pairs)"
"""The way out where the samples of a batch cannot be counted."""


def batches_of(data: Any, device: torch.device) -> list[tuple[Any, int]]:
    """Return pairs (batch, number of samples) of any data, all in memory and on the device.

    Args:
        data: a `DataLoader`, a list or another iterable of batches, which is read once, or one
            batch: a tuple with a tensor in it, such as (inputs, targets), a mapping or a tensor.
        device: where the tensors go.

    Raises:
        UsageError: it is no such data, or its samples cannot be counted.
    """
    if isinstance(data, Dataset):
        raise UsageError(
            "data are a data set and not batches: give "
            "torch.utils.data.DataLoader(data_set, batch_size=256)"
        )
    if _is_one_batch(data):
        batches = [data]
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes):
        # A DataLoader draws a seed from torch's generator, which a training goes on with.
        with torch.random.fork_rng(devices=[]):
            batches = list(data)
    else:
        raise UsageError(
            f"data must be batches or one batch (inputs, targets), not {type(data).__name__}: give "
            "a DataLoader, a list of batches or a tuple of tensors"
        )
    _refuse_columns(batches)
    moved = [with_tensors(batch, lambda tensor: tensor.to(device)) for batch in batches]
    return [(batch, samples_in(batch)) for batch in moved]


def samples_in(batch: Any) -> int:
    """Return the number of samples of a batch: the length of all its tensors.

    Raises:
        UsageError: they have different lengths, or there are none.
    """
    if _is_counted(batch):
        raise UsageError(
            "a batch ends in a bare number, so it is a sample or has been counted already: put "
            f"samples into batches with a DataLoader, or {NUMBERS}"
        )
    lengths = {len(tensor) for tensor in tensors_in(batch) if tensor.ndim}
    if len(lengths) != 1:
        found = f"its tensors have the lengths {sorted(lengths)}" if lengths else "it has no tensor"
        raise UsageError(f"the samples of a batch cannot be counted ({found}): {NUMBERS}")
    return lengths.pop()


def checked_pairs(batches: Iterable[Any]) -> list[tuple[Any, int]]:
    """Return pairs (batch, number of samples) as a list, without those of no sample.

    Raises:
        UsageError: they are not such pairs.
    """
    pairs = list(batches)
    for pair in pairs:
        if not _is_counted(pair):
            raise UsageError(
                "batches must be pairs (batch, number of samples): "
                "FrozenLoss.of(model, loss_function, data) counts the samples itself"
            )
        if pair[1] < 0:
            raise UsageError(f"a batch cannot have {pair[1]} samples: count them from zero up")
    return [(batch, int(size)) for batch, size in pairs if size]


def _is_counted(pair: Any) -> bool:
    return isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], Integral)


def _is_one_batch(data: Any) -> bool:
    if isinstance(data, tuple):
        return any(isinstance(part, Tensor) for part in data)
    return isinstance(data, Tensor | Mapping)


def _refuse_columns(batches: list[Any]) -> None:
    """Refuse a list [inputs, targets], which would be taken for two batches."""
    if len(batches) > 1 and all(isinstance(batch, Tensor) for batch in batches):
        kinds = {(batch.dtype, batch.shape[1:]) for batch in batches}
        if len(kinds) > 1 or len(batches) == 2:
            raise UsageError(
                "a list of tensors may be one batch or several: give one batch as a tuple (inputs, "
                "targets), and several as [(inputs,), (inputs,)]"
            )
