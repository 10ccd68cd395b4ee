"""The launcher of `--nproc`: it starts ranks through torchrun and passes signals on.

A run on several nodes has no launcher: there the user starts torchrun.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from egtrain.errors import UsageError
from egtrain.progress import show_cursor
from egtrain.ranks.signals import stop_signals
from egtrain.ranks.torchrun import OUTCOMES, is_alive
from egtrain.workers import divisors

PATIENCE_SECONDS = 30.0
"""How long ranks may take to save and exit after torchrun has died."""


def launch(
    ranks: int, arguments: list[str], max_restarts: int = 0, lock_file: int | None = None
) -> int:
    """Run `python -m egtrain ARGUMENTS` as `ranks` processes under torchrun; return its exit code.

    SIGTERM, Ctrl-C and SIGHUP are passed on to every rank, which saves and exits; then the code is
    75. Another signal more than two seconds after the first ends all processes.

    `lock_file` is an open file that the ranks also hold, as their standard input. So the lock ends
    with the last rank, even if this process and torchrun are killed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "--max-restarts", str(max_restarts)]
    command += ["-m", "egtrain", *arguments]
    with tempfile.TemporaryDirectory(prefix="egtrain-") as name:
        folder = Path(name)
        (folder / "launcher").write_text(str(os.getpid()))
        environment = {"OMP_NUM_THREADS": "1"}  # torchrun warns without; the run sets its threads
        environment |= {**os.environ, OUTCOMES: name}

        def ask_ranks_to_stop() -> None:
            (folder / "stop").touch()
            _signal_ranks(folder, signal.SIGTERM)

        def end_at_once(number: int) -> None:
            process.terminate()  # it ends the ranks that are not ready for signals yet
            _signal_ranks(folder, signal.SIGKILL)
            (folder / "exit").write_text(str(128 + number))

        with stop_signals(ask_ranks_to_stop, end_at_once):
            # A new session: the terminal's signals reach the ranks only once, through this process.
            process = subprocess.Popen(
                command, env=environment, stdin=lock_file, start_new_session=True
            )
            returned = process.wait()
            # torchrun has waited for the ranks. If it was killed, they notice, save and exit.
            deadline = time.monotonic() + PATIENCE_SECONDS
            while _ranks_alive(folder) and time.monotonic() < deadline:
                time.sleep(0.1)
            _signal_ranks(folder, signal.SIGKILL)
            show_cursor()  # which a rank that was killed has hidden
        noted = folder / "exit"
        return (int(noted.read_text()) if noted.exists() else 0) or (1 if returned else 0)


def _ranks_alive(folder: Path) -> list[int]:
    """Return the process numbers, as noted by the ranks, of those that are still running."""
    started = [int(file.read_text() or 0) for file in folder.glob("rank-*")]
    return [pid for pid in started if pid and is_alive(pid)]


def _signal_ranks(folder: Path, number: int) -> None:
    for pid in _ranks_alive(folder):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def require_dividing(workers: int, ranks: int) -> None:
    """Raise UsageError, naming the possible numbers, if the ranks do not divide the workers."""
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
