"""Starting a run's ranks: through torchrun with `--nproc`, or found in the environment that torchrun sets."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from egtrain.errors import EgtrainError, UsageError
from egtrain.workers import Ranks

T = TypeVar("T")
OUTCOMES = "EGTRAIN_OUTCOMES"
"""Environment variable: a folder where ranks leave their process number and rank 0 the exit code, for `--nproc`."""


def started_by_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def restart_count() -> int:
    """Return how often torchrun has restarted the ranks of this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def is_first_rank() -> bool:
    """Return whether this process is rank 0, before any group is joined."""
    return int(os.environ.get("RANK", "0")) == 0


def pick_device(name: str) -> torch.device:
    """Return the device of this rank for `auto`, `cpu` or `cuda`.

    Raises:
        UsageError: `cuda` was asked for and there is none, or fewer than ranks on this node.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("no CUDA device was found: use --device cpu, or install a CUDA build of torch")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"{os.environ.get('LOCAL_WORLD_SIZE')} ranks need as many GPUs, and there are "
            f"{torch.cuda.device_count()}: lower --nproc; more workers than GPUs need no more ranks"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def joined_ranks(device_name: str, timeout_seconds: float = 600) -> Iterator[Ranks]:
    """Join the process group that torchrun prepared, if it did, and leave it in the end."""
    device = pick_device(device_name)
    if not started_by_torchrun():
        yield Ranks(device=device)
        return
    # A restarted group must not meet the addresses that the dead one left in the agent's store.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    timeout = timedelta(seconds=timeout_seconds)
    agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(address, port, world, is_master=rank == 0 and not agent_has_store, timeout=timeout)
    prefixed = PrefixStore(f"attempt_{restart_count()}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world, timeout=timeout)
    try:
        yield Ranks(rank, world, device)
    finally:
        dist.destroy_process_group()


def agreed(text: str, ranks: Ranks) -> str:
    """Return rank 0's text on every rank."""
    if ranks.count == 1:
        return text
    holder = [text]
    dist.broadcast_object_list(holder, device=ranks.device)
    return holder[0]


def first_rank_first(ranks: Ranks, prepare: Callable[[], T]) -> T:
    """Return prepare() of every rank, after rank 0's: it alone downloads files, and its failure is everybody's.

    Raises:
        EgtrainError: what `prepare` raised on rank 0, with its exit code.
    """
    if ranks.count == 1:
        return prepare()
    result: T | None = None
    failure: list[EgtrainError | None] = [None]
    if ranks.rank == 0:
        try:
            result = prepare()
        except EgtrainError as error:
            failure = [error]
    dist.broadcast_object_list(failure, device=ranks.device)
    if failure[0] is not None:
        raise failure[0]
    return prepare() if result is None else result


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a request that the loop sees after the step; a second one ends the process.

    Signals within two seconds count as one, since a terminal and a launcher both deliver Ctrl-C. A rank whose
    launcher has died asks to stop as well.
    """

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._first: float | None = None

    def __call__(self) -> bool:
        """Return whether the run was asked to stop."""
        return self._first is not None or (started_by_torchrun() and os.getppid() != self._parent)

    def __enter__(self) -> "StopSignal":
        self._previous = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif now - self._first > 2:
            os._exit(128 + number)


def note_process() -> None:
    """Leave this rank's process number for the launcher that `--nproc` is."""
    if folder := os.environ.get(OUTCOMES):
        Path(folder, f"rank-{os.environ['RANK']}.pid").write_text(str(os.getpid()))


def note_exit(code: int) -> None:
    """Leave the exit code for the launcher that `--nproc` is; torchrun itself returns 1 for every failure."""
    if folder := os.environ.get(OUTCOMES):
        Path(folder, "exit").write_text(str(code))


def launch(ranks: int, arguments: list[str], max_restarts: int) -> int:
    """Run `python -m egtrain ARGUMENTS` as `ranks` processes under torchrun and return the run's exit code.

    SIGTERM and Ctrl-C are handed to every rank, which saves and leaves; then the code is 75.
    """
    with tempfile.TemporaryDirectory(prefix="egtrain-") as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["--max-restarts", str(max_restarts), "-m", "egtrain", *arguments]
        environment = {**os.environ, OUTCOMES: folder}
        environment.setdefault("OMP_NUM_THREADS", "1")  # torchrun warns without; the run sets its own threads
        # A session of its own: the terminal's Ctrl-C reaches the ranks through this process only, once.
        process = subprocess.Popen(command, env=environment, start_new_session=True)

        def forward(number: int, frame: FrameType | None) -> None:
            started = [int(file.read_text() or 0) for file in Path(folder).glob("rank-*.pid")]
            for pid in started or [process.pid]:
                try:
                    os.kill(pid, signal.SIGTERM)
                except ProcessLookupError:
                    continue

        previous = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            returned = process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        noted = Path(folder, "exit")
        return int(noted.read_text()) if noted.exists() else returned


def require_dividing(workers: int, ranks: int) -> None:
    """Raise UsageError, naming the possible numbers, where the ranks do not divide the workers."""
    if ranks < 1 or workers % ranks:
        possible = ", ".join(str(r) for r in range(1, workers + 1) if workers % r == 0)
        raise UsageError(f"{workers} workers cannot be shared by {ranks} ranks: use --nproc {possible}")


def default_ranks(device_name: str, workers: int) -> int:
    """Return the most GPUs that divide the workers, or 1 without a GPU."""
    if device_name == "cpu" or not torch.cuda.is_available():
        return 1
    return max(r for r in range(1, torch.cuda.device_count() + 1) if workers % r == 0)
