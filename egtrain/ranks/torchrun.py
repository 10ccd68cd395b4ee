"""What torchrun and the launcher of `--nproc` tell the ranks that they start."""

import os
from datetime import timedelta
from functools import cache
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

OUTCOMES = "EGTRAIN_OUTCOMES"
"""Environment variable: a folder for notes between the launcher of `--nproc` and its ranks.

The launcher notes its process number (`launcher`) and that it was asked to stop (`stop`); the ranks
note their process numbers (`rank-*`) and the exit code of the run (`exit`).
"""
DIRECTORY_KEY = "egtrain/run_directory"
"""Key in torchrun's store, which outlives a restart of the ranks."""


def started_by_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def has_launcher() -> bool:
    """Return whether the launcher of `--nproc` started this process."""
    return OUTCOMES in os.environ


def restart_count() -> int:
    """Return how often torchrun has restarted the ranks of this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def rank() -> int:
    """Return the rank of this process; 0 if it is the only one."""
    return int(os.environ.get("RANK", "0"))


def is_alive(pid: int) -> bool:
    """Return whether a process with this number exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def store_address() -> tuple[str, int]:
    """Return the host and port of the ranks' store."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def holds_store() -> bool:
    """Return whether this rank holds the store, and not torchrun."""
    return os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


@cache
def store() -> TCPStore:
    """Return a new connection to the store: the process group's can be blocked by long waits."""
    return TCPStore(*store_address(), is_master=False, timeout=timedelta(seconds=5))


def remember_directory(directory: Path) -> None:
    """Note which directory this attempt made, for attempts after a restart by torchrun."""
    if started_by_torchrun():
        store().set(DIRECTORY_KEY, str(directory))


def directory_made_before() -> Path | None:
    """Return the directory that an earlier attempt of this run made, if any."""
    restarted = started_by_torchrun() and restart_count() > 0
    if not restarted or not store().check([DIRECTORY_KEY]):
        return None
    return Path(store().get(DIRECTORY_KEY).decode())
