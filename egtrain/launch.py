"""Starting a run's ranks: through torchrun with `--nproc`, or found in the environment that
torchrun sets.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from egtrain.errors import EgtrainError, InterruptedRun, UsageError
from egtrain.workers import Ranks, divisors

T = TypeVar("T")
OUTCOMES = "EGTRAIN_OUTCOMES"
"""Environment variable: a folder in which the launcher that `--nproc` is and its ranks leave notes
for each other.

The launcher leaves its process number (`launcher`) and that it was asked to stop (`stop`), the
ranks leave their process numbers (`rank-*`) and the exit code of the run (`exit`).
"""
DIRECTORY_KEY = "egtrain/run_directory"
"""Key in torchrun's store, which outlives a restart of the ranks."""
PATIENCE_SECONDS = 30.0
"""How long ranks may take to save and leave after torchrun has died."""


def started_by_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def has_launcher() -> bool:
    """Return whether the launcher that `--nproc` is started this process."""
    return OUTCOMES in os.environ


def restart_count() -> int:
    """Return how often torchrun has restarted the ranks of this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def pick_device(name: str) -> torch.device:
    """Return the device of this rank for `auto`, `cpu` or `cuda`.

    Raises:
        UsageError: `cuda` was asked for and there is none, or fewer than ranks on this node; on
            each of its ranks.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    require_cuda()
    local_rank, local_ranks = (
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
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
    """Join the process group that torchrun prepared, if it did, and leave it in the end."""
    device = pick_device(device_name)
    if not started_by_torchrun():
        yield Ranks(device=device)
        return
    # A restarted group must not meet the addresses that the dead one left in the agent's store.
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    timeout = timedelta(seconds=timeout_seconds)
    agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        *_store_address(), world, is_master=rank == 0 and not agent_has_store, timeout=timeout
    )
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
    """Return prepare() of every rank, rank 0's before the others': what fails on one of them fails
    on all.

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
        for failed in failures:
            if failed is not None:
                raise failed
    return done[0]


def only_first_rank(ranks: Ranks, act: Callable[[], object]) -> None:
    """Call act() on rank 0; what fails there fails on all.

    Raises:
        EgtrainError: what `act` raised, with its exit code.
    """
    first_rank_first(ranks, lambda: act() if ranks.rank == 0 else None)


def remember_directory(directory: Path) -> None:
    """Tell a later attempt of this run, after a restart by torchrun, which directory it has
    made.
    """
    if started_by_torchrun():
        _store().set(DIRECTORY_KEY, str(directory))


def directory_made_before() -> Path | None:
    """Return the directory that an earlier attempt of this run has made, if there was one."""
    if restart_count() == 0 or not (store := _store()).check([DIRECTORY_KEY]):
        return None
    return Path(store.get(DIRECTORY_KEY).decode())


def _store_address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _store() -> TCPStore:
    return TCPStore(*_store_address(), is_master=False, timeout=timedelta(seconds=60))


class StoppedEarly(BaseException):
    """A signal before the training; not an Exception, since many an import catches those.

    Nor KeyboardInterrupt: Python ends by a signal, whatever its exit code, if one has passed
    through `exec`.
    """


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a request that the loop sees after the step; a second one ends
    the process.

    Signals within two seconds count as one, since a terminal and a launcher both deliver Ctrl-C. A
    rank whose torchrun or launcher has died asks to stop as well. Before `training` is set, a
    process that is a run by itself stops at once, with StoppedEarly; ranks go on to their first
    step, so that they stop together.
    """

    def __init__(self) -> None:
        self.training = started_by_torchrun()
        self._parent = os.getppid()
        self._launcher: int | None = None
        self._first: float | None = None

    def __call__(self) -> bool:
        """Return whether the run was asked to stop."""
        return self._first is not None or self._abandoned()

    def __enter__(self) -> "StopSignal":
        self._previous = {
            s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)
        }
        # Only now, so that the launcher finds a process that is ready for its signal, or else
        # leaves word.
        if folder := os.environ.get(OUTCOMES):
            Path(folder, f"rank-{os.environ['RANK']}").write_text(str(os.getpid()))
            Path(folder, "exit").unlink(missing_ok=True)
            self._launcher = int(Path(folder, "launcher").read_text())
            if Path(folder, "stop").exists():
                self._first = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _abandoned(self) -> bool:
        if not started_by_torchrun():
            return False
        return os.getppid() != self._parent or (
            self._launcher is not None and not _is_alive(self._launcher)
        )

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            if not self.training:
                raise StoppedEarly
        elif now - self._first > 2:
            os._exit(128 + number)


def leave_rank(code: int) -> NoReturn:
    """End a rank with a code for torchrun, which restarts what fails and returns 1 for every
    failure.

    Under the launcher that `--nproc` is, an expected failure is noted for it. An interrupted run
    has not failed. The interpreter is not taken down in order: of six ranks one was seen to abort
    there, in a thread of Gloo's.
    """
    if folder := os.environ.get(OUTCOMES):
        if code:
            with suppress(OSError):
                Path(folder, "exit").write_text(str(code))
        code = 0
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(0 if code == InterruptedRun.exit_code else code)


def launch(
    ranks: int, arguments: list[str], max_restarts: int = 0, lock_file: int | None = None
) -> int:
    """Run `python -m egtrain ARGUMENTS` as `ranks` processes under torchrun and return the run's
    exit code.

    `lock_file` is an open file that the ranks shall hold, too, as their standard input: so the lock
    ends with the last of them, even where this process and torchrun are killed.

    SIGTERM and Ctrl-C are handed to every rank, which saves and leaves; then the code is 75. A
    second one, later than two seconds after the first, ends all processes.
    """
    with tempfile.TemporaryDirectory(prefix="egtrain-") as name:
        folder = Path(name)
        (folder / "launcher").write_text(str(os.getpid()))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
        ]
        command += ["--max-restarts", str(max_restarts), "-m", "egtrain", *arguments]
        environment = {**os.environ, OUTCOMES: name}
        environment.setdefault(
            "OMP_NUM_THREADS", "1"
        )  # torchrun warns without; the run sets its own threads
        asked: list[float] = []

        def forward(number: int, frame: FrameType | None) -> None:
            asked.append(time.monotonic())
            if asked[-1] - asked[0] > 2:
                process.terminate()  # it ends the ranks that are not ready for signals yet
                _signal_ranks(folder, signal.SIGKILL)
                (folder / "exit").write_text(str(128 + number))
                return
            (folder / "stop").touch()
            _signal_ranks(folder, signal.SIGTERM)

        previous = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            # A session of its own: the terminal's Ctrl-C reaches the ranks through this process
            # only, once.
            process = subprocess.Popen(
                command, env=environment, stdin=lock_file, start_new_session=True
            )
            returned = process.wait()
            # torchrun has waited for the ranks, unless it was killed; then they notice, save and
            # leave.
            deadline = time.monotonic() + PATIENCE_SECONDS
            while _ranks_alive(folder) and time.monotonic() < deadline:
                time.sleep(0.1)
            _signal_ranks(folder, signal.SIGKILL)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        noted = folder / "exit"
        return (int(noted.read_text()) if noted.exists() else 0) or (1 if returned else 0)


def _ranks_alive(folder: Path) -> list[int]:
    started = [int(file.read_text() or 0) for file in folder.glob("rank-*")]
    return [pid for pid in started if pid and _is_alive(pid)]


def _signal_ranks(folder: Path, number: int) -> None:
    for pid in _ranks_alive(folder):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def require_dividing(workers: int, ranks: int) -> None:
    """Raise UsageError, naming the possible numbers, where the ranks do not divide the workers."""
    if ranks < 1 or workers % ranks:
        possible = ", ".join(map(str, divisors(workers)))
        raise UsageError(
            f"{workers} workers cannot be shared by {ranks} ranks: use --nproc {possible}"
        )


def default_ranks(device_name: str, workers: int) -> int:
    """Return the most GPUs that divide the workers, or 1 without a GPU."""
    if device_name == "cpu" or not torch.cuda.is_available():
        return 1
    return max(r for r in range(1, torch.cuda.device_count() + 1) if workers % r == 0)
