"""Being one of a run's ranks: joining the others, and acting together."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from egtrain.errors import EgtrainError, UsageError
from egtrain.ranks.failures import end_when_another_rank_fails
from egtrain.ranks.torchrun import holds_store, restart_count, started_by_torchrun, store_address
from egtrain.workers import Ranks

T = TypeVar("T")


def pick_device(name: str) -> torch.device:
    """Return the device of this rank for `auto`, `cpu` or `cuda`.

    Raises:
        UsageError: on every rank of the node, if there is no GPU for `cuda`, or fewer than ranks.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    require_cuda()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_ranks > torch.cuda.device_count():
        raise UsageError(
            f"{local_ranks} ranks need as many GPUs, and there are {torch.cuda.device_count()}: "
            "lower --nproc; more workers than GPUs need no more ranks"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def require_cuda() -> None:
    """Raise UsageError where there is no CUDA device."""
    if not torch.cuda.is_available():
        raise UsageError(
            "no CUDA device was found: use --device cpu, or install a CUDA build of torch"
        )


@contextmanager
def joined_ranks(device_name: str, timeout_seconds: float = 600) -> Iterator[Ranks]:
    """Join the process group that torchrun prepared, if any, and leave it at the end.

    In the block, this process ends as soon as another rank reports a failure.
    """
    device = pick_device(device_name)
    if not started_by_torchrun():
        yield Ranks(device=device)
        return
    # A restarted group must not find the addresses that the dead one left in the agent's store.
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    timeout = timedelta(seconds=timeout_seconds)
    store = TCPStore(*store_address(), world, is_master=holds_store(), timeout=timeout)
    prefixed = PrefixStore(f"attempt_{restart_count()}", store)
    done = threading.Event()
    threading.Thread(target=end_when_another_rank_fails, args=[done], daemon=True).start()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world, timeout=timeout)
    yield Ranks(rank, world, device)
    # Not after a failure, which is reported first, lest the others report the lost connection.
    done.set()
    dist.destroy_process_group()


def agreed(text: str, ranks: Ranks) -> str:
    """Return rank 0's text on every rank."""
    if ranks.count == 1:
        return text
    holder = [text]
    dist.broadcast_object_list(holder, device=ranks.device)
    return holder[0]


def first_rank_first(ranks: Ranks, prepare: Callable[[], T]) -> T:
    """Call prepare() on rank 0, then on the others; what fails on one fails on all.

    Raises:
        EgtrainError: what `prepare` raised on some rank, with its exit code.
    """
    if ranks.count == 1:
        return prepare()
    done: list[T] = []
    failure: EgtrainError | None = None
    for turn_of_first in (True, False):
        if (ranks.rank == 0) == turn_of_first:
            try:
                done.append(prepare())
            except EgtrainError as error:
                failure = error
        failures: list[EgtrainError | None] = [None] * ranks.count
        dist.all_gather_object(failures, failure)
        for rank, failed in enumerate(failures):
            if failed is not None:
                failed.reported_by = rank
                raise failed
    return done[0]


def only_first_rank(ranks: Ranks, act: Callable[[], object]) -> None:
    """Call act() on rank 0; what fails there fails on all.

    Raises:
        EgtrainError: what `act` raised, with its exit code.
    """
    first_rank_first(ranks, lambda: act() if ranks.rank == 0 else None)
