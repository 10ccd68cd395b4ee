"""Parameters that are sharded over processes, as DTensors: what FSDP2 and tensor parallelism make.

A DTensor stands for the whole tensor: what is computed from it is the same on every process.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(*tensors: Tensor) -> bool:
    """Return whether one of these is a DTensor."""
    # There is none before this module is imported, which takes a while.
    module = sys.modules.get("torch.distributed.tensor")
    # By the few types that there are: hundreds of parameters are looked at in each block.
    types = set(map(type, tensors))
    return module is not None and any(issubclass(t, module.DTensor) for t in types)


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the Euclidean norm of each tensor, a scalar; of a sharded one, that of the whole."""
    found = list(torch._foreach_norm(list(tensors)))
    if not is_sharded(*tensors):
        return found
    # Stacked, so that the processes sum them all at once.
    return list(torch.stack(found).full_tensor().unbind())  # type: ignore[attr-defined]


def summed(norm: Tensor) -> Tensor:
    """Return a norm that can be changed in place, also if each process has a part of it."""
    if not is_sharded(norm):
        return norm
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if p.is_partial() else p for p in norm.placements]  # type: ignore[attr-defined]
    whole: Tensor = norm.redistribute(placements=placements)  # type: ignore[attr-defined]
    return whole


def copy_all(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same shapes, sharded or not."""
    # torch 2.13 has no `_foreach_copy_` of DTensors, and takes no empty lists.
    if into:
        torch._foreach_copy_(shards(into, into), shards(source, into))


def subtract_all(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Subtract others from tensors in place, sharded or not, however the others are sharded."""
    if tensors:
        torch._foreach_sub_(shards(tensors, tensors), shards(others, tensors))


def shards(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Return this process's shard of each tensor, cut as the other list's; a whole one as it is.

    Raises:
        ValueError: a whole tensor is given for a sharded one.
    """
    if not is_sharded(*like):
        return list(tensors)
    return [_shard(t, x) if is_sharded(x) else t for t, x in zip(tensors, like, strict=True)]


def _shard(tensor: Any, like: Any) -> Tensor:
    if not is_sharded(tensor):
        raise ValueError(
            "a whole tensor belongs to a sharded parameter: make it from the parameter, as "
            "torch.zeros_like does"
        )
    if tensor.placements != like.placements:
        tensor = tensor.redistribute(placements=like.placements)
    local: Tensor = tensor.to_local()
    return local


def sharded_like(whole: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor that every process has, sharded as another one of its shape is."""
    if not is_sharded(tensor):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def noise_like(tensor: Tensor, draw: Callable[[Tensor], object]) -> Tensor:
    """Return noise that `draw` writes into a vector: the same on any number of processes.

    Each process draws that of the whole tensor and keeps its shard.
    """
    whole = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if is_sharded(tensor)
        else torch.empty_like(tensor)
    )
    # In memory order: torch draws several times slower into a non-contiguous tensor.
    draw(whole.as_strided((whole.numel(),), (1,)))
    return sharded_like(whole, tensor)
