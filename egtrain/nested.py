"""Batches of any form: tensors in tuples, lists and mappings, at any depth."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from copy import copy
from typing import Any

from torch import Tensor


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch, in an order that depends on nothing but the batch."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for key in sorted(batch, key=str):
            yield from tensors_in(batch[key])
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from tensors_in(part)


def with_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch with each tensor changed; the batch itself if that changes none."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, MutableMapping):
        changed = {key: with_tensors(value, change) for key, value in batch.items()}
        if all(changed[key] is value for key, value in batch.items()):
            return batch
        result = copy(batch)  # of its own class
        result.update(changed)
        return result
    if isinstance(batch, list | tuple):
        parts = [with_tensors(part, change) for part in batch]
        if all(part is before for part, before in zip(parts, batch, strict=True)):
            return batch
        named = hasattr(batch, "_fields")
        return type(batch)(*parts) if named else type(batch)(parts)
    return batch
