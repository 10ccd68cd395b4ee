"""Being one of a run's ranks: what torchrun's environment says, joining the others, acting
together, stopping together, and ending together where one of them fails.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from egtrain.errors import EgtrainError, InterruptedRun, UsageError
from egtrain.progress import show_cursor
from egtrain.signals import stop_signals
from egtrain.workers import Ranks

T = TypeVar("T")
OUTCOMES = "EGTRAIN_OUTCOMES"
"""Environment variable: a folder in which the launcher that `--nproc` is and its ranks leave notes
for each other.

The launcher leaves its process number (`launcher`) and that it was asked to stop (`stop`), the
ranks leave their process numbers (`rank-*`) and the exit code of the run (`exit`).
"""
DIRECTORY_KEY = "egtrain/run_directory"
"""Key in torchrun's store, which outlives a restart of the ranks."""
FAILURE_KEY = "egtrain/failure"
"""Key in torchrun's store, with the attempt's number: the first failure of a rank."""
WATCH_SECONDS = 0.5
"""How often a rank looks whether another one has failed."""


# ---- what this process is


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


# ---- joining the others, and acting together


@contextmanager
def joined_ranks(device_name: str, timeout_seconds: float = 600) -> Iterator[Ranks]:
    """Join the process group that torchrun prepared, if it did, and leave it in the end.

    In the block, this process ends as soon as another rank reports a failure.
    """
    device = pick_device(device_name)
    if not started_by_torchrun():
        yield Ranks(device=device)
        return
    # A restarted group must not meet the addresses that the dead one left in the agent's store.
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    timeout = timedelta(seconds=timeout_seconds)
    store = TCPStore(*_store_address(), world, is_master=_holds_store(), timeout=timeout)
    prefixed = PrefixStore(f"attempt_{restart_count()}", store)
    done = threading.Event()
    threading.Thread(target=_end_when_another_rank_fails, args=[done], daemon=True).start()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world, timeout=timeout)
    yield Ranks(rank, world, device)
    # Not after a failure: that is reported first, so that the others do not take the lost
    # connection for one.
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


def remember_directory(directory: Path) -> None:
    """Tell a later attempt of this run, after a restart by torchrun, which directory it has
    made.
    """
    if started_by_torchrun():
        _store().set(DIRECTORY_KEY, str(directory))


def directory_made_before() -> Path | None:
    """Return the directory that an earlier attempt of this run has made, if there was one."""
    if restart_count() == 0 or not _store().check([DIRECTORY_KEY]):
        return None
    return Path(_store().get(DIRECTORY_KEY).decode())


def _store_address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _holds_store() -> bool:
    """Return whether this rank holds the store, which torchrun does where it started the ranks."""
    return os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


@cache
def _store() -> TCPStore:
    """Return a connection to the store beside the process group's, which waits in it for long."""
    return TCPStore(*_store_address(), is_master=False, timeout=timedelta(seconds=5))


# ---- stopping together


class StoppedEarly(BaseException):
    """A signal before the training; not an Exception, since many an import catches those.

    Nor KeyboardInterrupt: Python ends by a signal, whatever its exit code, if one has passed
    through `exec`.
    """


def _end_at_once(number: int) -> NoReturn:
    show_cursor()
    os._exit(128 + number)


class StopSignal:
    """Turns SIGTERM, Ctrl-C and SIGHUP into a request that the loop sees after the step; a second
    one ends the process.

    A rank whose torchrun or launcher has died asks to stop as well. Before `training` is set, a
    process that is a run by itself stops at once, with StoppedEarly; ranks go on to their first
    step, so that they stop together.
    """

    def __init__(self) -> None:
        self.training = started_by_torchrun()
        self._parent = os.getppid()
        self._launcher: int | None = None
        self._asked = False
        self._signals = ExitStack()

    def __call__(self) -> bool:
        """Return whether the run was asked to stop."""
        return self._asked or self._abandoned()

    def __enter__(self) -> "StopSignal":
        self._signals.enter_context(stop_signals(self._ask, _end_at_once))
        # Only now, so that the launcher finds a process that is ready for its signal, or else
        # leaves word.
        if folder := os.environ.get(OUTCOMES):
            Path(folder, f"rank-{os.environ['RANK']}").write_text(str(os.getpid()))
            Path(folder, "exit").unlink(missing_ok=True)
            self._launcher = int(Path(folder, "launcher").read_text())
            self._asked |= Path(folder, "stop").exists()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._signals.close()

    def _abandoned(self) -> bool:
        if not started_by_torchrun():
            return False
        return os.getppid() != self._parent or (
            self._launcher is not None and not is_alive(self._launcher)
        )

    def _ask(self) -> None:
        self._asked = True
        if not self.training:
            raise StoppedEarly


def is_alive(pid: int) -> bool:
    """Return whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# ---- ending together


def end_rank(code: int, failure: BaseException | None = None) -> NoReturn:
    """End a rank with its exit code, or 1 for a failure that nobody expected; a failure is printed
    once in the run, and the other ranks end for it within seconds.

    torchrun restarts what fails and returns 1 for every failure. So under the launcher that
    `--nproc` is, an expected failure is noted for it. An interrupted run has not failed.
    """
    if failure is None:
        _leave(code, restart=False)
    expected = isinstance(failure, EgtrainError)
    whose = failure.reported_by if isinstance(failure, EgtrainError) else None
    if whose not in (None, _rank()):
        # torchrun would end that rank as soon as this one has ended.
        _wait_for_report(seconds=10)
        _leave(code, restart=False)
    if whose is None and _rank():
        # What fails on all, such as a wrong option, is rank 0's to tell.
        _wait_for_report(seconds=1)
    text = str(failure) if expected else ""
    report = {"rank": _rank(), "code": code, "restart": not expected, "text": text}
    first = _first_report(report)
    if first is report or (expected and first["text"] != text):
        _print_failure(failure)
    # What happens after the first failure is mostly its consequence: a lost connection.
    _leave(first["code"], first["restart"])


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _print_failure(failure: BaseException) -> None:
    where = f"rank {_rank()}: " if _rank() else ""
    if isinstance(failure, EgtrainError):
        print(f"egtrain: {where}{failure}", file=sys.stderr)
    else:
        print(f"egtrain: {where}an unexpected failure", file=sys.stderr)
        sys.excepthook(type(failure), failure, failure.__traceback__)


def _failure_key() -> str:
    return f"{FAILURE_KEY}/{restart_count()}"


def _first_report(report: dict[str, Any]) -> dict[str, Any]:
    """Put a report into the store and return the first one of this attempt, or `report` itself."""
    try:
        written = json.dumps(report)
        found = _store().compare_set(_failure_key(), "", written).decode()
    except (KeyError, ValueError, RuntimeError):
        return report  # the store is gone with its holder, so nobody else can be told
    first: dict[str, Any] = report if found == written else json.loads(found)
    if first is report and _holds_store():
        time.sleep(2 * WATCH_SECONDS)  # it ends with this process, and the others shall see it
    return first


def _wait_for_report(seconds: float) -> None:
    """Wait until some rank has reported a failure."""
    deadline = time.monotonic() + seconds
    with suppress(KeyError, ValueError, RuntimeError):
        while time.monotonic() < deadline and not _store().check([_failure_key()]):
            time.sleep(0.05)


def _end_when_another_rank_fails(done: threading.Event) -> None:
    with suppress(RuntimeError):  # torchrun is gone: StopSignal notices it, too
        while not _store().check([_failure_key()]):
            if done.wait(WATCH_SECONDS):
                return
        first = json.loads(_store().get(_failure_key()))
        if first["rank"] != _rank():
            _leave(first["code"], first["restart"])


def _leave(code: int, restart: bool) -> NoReturn:
    """End this process, with a code that lets torchrun restart it or not.

    The interpreter is not taken down in order: of six ranks one was seen to abort there, in a
    thread of Gloo's.
    """
    if (folder := os.environ.get(OUTCOMES)) and not restart:
        if code:
            with suppress(OSError):
                Path(folder, "exit").write_text(str(code))
        code = 0
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(0 if code == InterruptedRun.exit_code else code)
