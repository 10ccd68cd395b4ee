"""Who a run directory belongs to: made, claimed, locked and withdrawn here.

A run holds its directory from the moment it first reads it until it ends, so that no other run
trains in it, changes its settings or deletes it.
"""

import fcntl
import json
import os
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Self

from egtrain.disk import write_atomically
from egtrain.errors import EgtrainError, UsageError

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
CHECKPOINTS, LOCK = "checkpoints", ".lock"
PLAN = "plan.json"
"""What a run is going to do, from its start on: `steps` and the `metric` that counts."""
FAILURE = "failure.json"
"""How the training failed, until it goes on: `exit_code` and `message`."""


class _TakenError(UsageError):
    """A directory that belongs to another run."""


class RunDirectory:
    """The directory of one run, which holds it in a `with` block.

    Args:
        path: made if it does not exist.
        goes_on_from: the bytes of config.yaml that this run's settings were compared with; None: a
            new run, in a directory without one.
        held_by_launcher: whether the process that started this rank holds the directory for it.
        numbered: whether to take `path`-2, `path`-3 and so on if others have the directory: for
            runs that start in the same second.

    Raises:
        UsageError: on entering: another process holds the directory, or it cannot be written; it
            holds a run and this is a new one; or its settings have changed since they were read.
    """

    def __init__(
        self,
        path: Path,
        *,
        goes_on_from: bytes | None = None,
        held_by_launcher: bool = False,
        numbered: bool = False,
    ) -> None:
        self.path = path
        """That of the directory which is held in the end, once it is."""
        self.held_by_launcher = held_by_launcher
        self.goes_on = held_by_launcher or goes_on_from is not None
        self._before = goes_on_from
        self._numbered = numbered
        self._lock = None if held_by_launcher else self._lock_of(path)
        self._metrics: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        if self._lock is None:
            return self
        wanted = self.path
        for number in count(2):
            try:
                self._claim(self._lock)
            except _TakenError:
                if not self._numbered:
                    raise
                self.path = wanted.with_name(f"{wanted.name}-{number}")
                self._lock = self._lock_of(self.path)
            else:
                break
        self._metrics = self._stamp_of_metrics()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.__exit__()

    @property
    def lock_file(self) -> int | None:
        """The open, locked file; a process that inherits it holds the directory too."""
        return None if self._lock is None else self._lock.file

    def write_config(self, text: str) -> None:
        """Write the settings of the run from now on.

        Raises:
            EgtrainError: they could not be written.
        """
        write_atomically(self.path / CONFIG, text.encode())

    def withdraw(self) -> None:
        """Undo everything for a run that trained nothing, so that it can be started again."""
        if self._lock is None or self._stamp_of_metrics() != self._metrics:
            return
        if self._before is not None:
            write_atomically(self.path / CONFIG, self._before)
            return
        if (self.path / CHECKPOINTS).exists():
            return
        (self.path / CONFIG).unlink(missing_ok=True)
        with suppress(OSError):  # a directory that holds something else stays
            (self.path / LOCK).unlink()
            self.path.rmdir()

    def _lock_of(self, path: Path) -> "RunLock":
        # Where there is another directory to take, there is nothing to wait for.
        return RunLock(path, patience_seconds=0) if self._numbered else RunLock(path)

    def _claim(self, lock: "RunLock") -> None:
        lock.__enter__()
        try:
            self._require_as_it_was()
        except BaseException:
            lock.__exit__()
            raise

    def _require_as_it_was(self) -> None:
        file = self.path / CONFIG
        found = file.read_bytes() if file.exists() else None
        if found == self._before:
            return
        if self._before is None:
            raise _TakenError(
                f"{self.path} holds a run already: go on with --resume {self.path}, or choose "
                "another --output"
            )
        raise UsageError(
            f"another process has just changed {file}: give the command again to see its settings"
        )

    def _stamp_of_metrics(self) -> tuple[int, int] | None:
        """Return size and time of metrics.jsonl, which change as soon as something is logged."""
        try:
            status = (self.path / METRICS).stat()
        except FileNotFoundError:
            return None
        return status.st_size, status.st_mtime_ns


class RunLock:
    """Holds a run directory for one process at a time; the lock ends with the process.

    Raises:
        UsageError: another process holds the directory, or it cannot be written.
    """

    def __init__(self, directory: Path, patience_seconds: float = 2.0) -> None:
        self._path = directory / LOCK
        self._patience = patience_seconds
        self.file: int | None = None
        """Open while the lock is held; processes that inherit it hold the lock too."""

    def __enter__(self) -> Self:
        # A restarted run may meet the last moments of the killed one.
        deadline = time.monotonic() + self._patience
        while (file := self._open_and_lock()) is None:
            if time.monotonic() >= deadline:
                owner = ""
                with suppress(OSError):
                    owner = self._path.read_text(encoding="ascii", errors="replace").strip()
                raise _TakenError(
                    f"another run (process {owner or 'unknown'}) is writing to "
                    f"{self._path.parent}: "
                    "wait for it to end, or choose another directory with --output"
                )
            time.sleep(0.05)
        self.file = file
        # For information only: the operating system locks, so a full disk does not matter here.
        with suppress(OSError):
            os.ftruncate(self.file, 0)
            os.pwrite(self.file, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def _open_and_lock(self) -> int | None:
        """Open and lock the file and return it, or None if another process holds the lock."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(
                f"cannot write to {self._path.parent} ({error.strerror}): choose another "
                "directory with --output"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        except OSError:
            # A file system without locks: the run goes on unguarded.
            return file
        # Its last holder may have deleted it, as a run does that could not start.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), self._path.stat()):
                return file
        os.close(file)
        return None


def is_held(directory: Path) -> bool:
    """Return whether a process holds a run directory.

    The holder is not disturbed, and a run that starts in this very moment waits for it to pass. A
    file system without locks cannot tell, and nobody holds anything there.
    """
    try:
        file = os.open(directory / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False


def note_failure(directory: Path, error: Exception) -> None:
    """Write down how a run failed, for those who look at its files; a full disk does not matter."""
    said = " ".join(str(error).split())[:500]
    record = {
        "exit_code": error.exit_code if isinstance(error, EgtrainError) else 1,
        "message": said if isinstance(error, EgtrainError) else f"{type(error).__name__}: {said}",
    }
    with suppress(EgtrainError):
        write_atomically(directory / FAILURE, f"{json.dumps(record, indent=1)}\n".encode())
