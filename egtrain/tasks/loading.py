"""Batches of a user's data set: fetched by index, ahead of time, and always the same.

The random state of Python, NumPy and torch is set before each sample is fetched, as a function of
(seed, purpose, numbers, index). So a sample does not depend on who fetches it, or after what.
"""

import atexit
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.queues import Queue
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from egtrain.data.user import UserData
from egtrain.errors import EgtrainError, UsageError
from egtrain.nested import tensors_in, with_tensors
from egtrain.optim.randomness import seed_for
from egtrain.task_file import TaskFileError

Place = TypeVar("Place")


class Key(NamedTuple):
    """What a batch consists of; a sample's random state is a function of this and the seed."""

    purpose: str
    numbers: tuple[int, ...]
    """What the random state depends on besides, such as the epoch."""
    indices: list[int]


def fetched(data: UserData, split: str, key: Key, seed: int) -> Any:
    """Fetch the samples of a batch and put them together.

    Raises:
        TaskFileError: the task file's code raised an exception.
        UsageError: the samples have different forms.
    """
    dataset, samples = data.datasets[split], []
    for index in key.indices:
        set_random_state(seed_for(seed, key.purpose, *key.numbers, index))
        with data.file.running(f"dataset({split!r})[{index}]"):
            samples.append(_without_graph(dataset[index]))
    if data.file.has("collate"):
        return _without_graph(data.file.call("collate", samples, settings=data.settings))
    try:
        return default_collate(samples)
    except Exception as error:  # whatever a class of the user's own raises there
        reason = " ".join(str(error).split())[:200]
        raise data.file.wrong(
            f"the samples of dataset({split!r}) do not fit into one batch ({reason}): give all of "
            "them one form, or define collate(samples)"
        ) from None


def _without_graph(samples: Any) -> Any:
    """Return samples that no gradient flows into: a graph cannot be sent between processes."""
    return with_tensors(samples, lambda tensor: tensor.detach() if tensor.requires_grad else tensor)


def require_sendable(data: UserData, batch: Any) -> None:
    """Raise UsageError if a loader could not send a batch to the process that it loads for."""
    try:
        pickle.dumps(batch)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise data.file.wrong(
            f"a batch cannot be sent between processes ({reason}): let samples hold tensors, "
            "numbers and texts, or set data.loaders to 0"
        ) from None


def set_random_state(seed: int) -> None:
    """Set the random state of Python, NumPy and torch on the CPU."""
    random.seed(seed)
    # The old interface, since its state is the one that a user's code may draw from.
    np.random.seed(seed & 0xFFFF_FFFF)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


def on_device(batch: Any, device: torch.device, channels_last: bool) -> Any:
    """Return a batch with its tensors on a device, images channels-last if asked for."""

    def move(tensor: Tensor) -> Tensor:
        if channels_last and tensor.ndim == 4 and tensor.is_floating_point():
            return tensor.to(device, non_blocking=True, memory_format=torch.channels_last)
        return tensor.to(device, non_blocking=True)

    moved = with_tensors(batch, move)
    if moved is batch and hasattr(batch, "to") and next(tensors_in(batch), None) is None:
        moved = batch.to(device)  # a class of its own, such as a graph
    return moved


class Batches(Generic[Place]):
    """The batches of a split in the order in which they are asked for, fetched ahead of time.

    Args:
        fetch: returns the batch of a place, in any process.
        following: returns the place that will be asked for after another; None at the end. Asking
            for another place is right too, and starts the loaders anew.
        loaders: processes that fetch; with 0 nothing is fetched ahead.
        pinned: keep batches in pinned memory, from which a GPU copies faster.
    """

    def __init__(
        self,
        fetch: Callable[[Place], Any],
        following: Callable[[Place], Place | None],
        *,
        loaders: int,
        pinned: bool,
    ) -> None:
        self._fetch = fetch
        self._following = following
        self._loaders = loaders
        self._pinned = pinned
        self._expected: Place | None = None
        self._fetched: Iterator[Any] = iter(())
        # In order: a loader that is killed at the end of the process is reported as a failure.
        atexit.register(_end, weakref.ref(self))

    def at(self, place: Place) -> Any:
        """Return the batch of a place.

        Raises:
            EgtrainError: what `fetch` raised, or a loader has died.
        """
        if not self._loaders:
            return self._fetch(place)
        if place != self._expected:
            self._fetched = self._loading_from(place)
        try:
            batch = next(self._fetched)
        except (RuntimeError, OSError, EOFError) as error:
            # Also where a batch that a dead loader has sent cannot be opened any more.
            reason = " ".join(str(error).split())[:200]
            raise EgtrainError(
                f"a process that loads samples has died ({reason}): it was killed, memory ran out, "
                "or the data set ended it; set data.loaders to less, or to 0 to see what it raises"
            ) from None
        if isinstance(batch, Exception):
            raise batch
        self._expected = self._following(place)
        if self._expected is None:
            self.end()
        return batch

    def end(self) -> None:
        """End the loaders."""
        self._fetched = iter(())

    def _loading_from(self, place: Place) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            _Fetched(self._fetch),  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._places(place),
            num_workers=self._loaders,
            collate_fn=_as_it_is,
            pin_memory=self._pinned,
            worker_init_fn=_begin_loader,
            # What a user's data set holds need not be picklable, and may be large.
            multiprocessing_context="fork",
            generator=torch.Generator(),  # lest it draws from torch's own
        )
        # torch's handler raises a loader's death anywhere: it is noticed where a batch is awaited.
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD)
        fetched = iter(loader)
        if main:
            signal.signal(signal.SIGCHLD, before)
        return fetched

    def _places(self, place: Place | None) -> Iterator[Place]:
        while place is not None:
            yield place
            place = self._following(place)


class _Fetched:
    """Fetches by place in a loader; what goes wrong is a result there, raised where it is read."""

    def __init__(self, fetch: Callable[[Any], Any]) -> None:
        self._fetch = fetch

    def __getitem__(self, place: Any) -> Any:
        try:
            return self._fetch(place)
        except (TaskFileError, UsageError) as error:
            return type(error)(str(error))  # without its traceback, which cannot be sent


def _end(batches: weakref.ref[Batches[Any]]) -> None:
    if (alive := batches()) is not None:
        alive.end()


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_loader(number: int) -> None:
    """Let a loader end with the process that it loads for, and by nothing else."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's, which that process handles
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A batch that cannot be sent would be awaited for ever.
    Queue._on_queue_feeder_error = staticmethod(_end_unsent)  # type: ignore[attr-defined]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_unsent(error: Exception, batch: object) -> None:
    reason = " ".join(str(error).split())[:200]
    print(f"egtrain: a batch cannot be sent between processes: {reason}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
