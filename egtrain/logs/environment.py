"""What a run's numbers depend on besides its settings: versions, hardware, the commit."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch

from egtrain import __version__


def versions() -> dict[str, str | None]:
    """Return the versions of the software that a run's numbers depend on."""
    return {
        "egtrain": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
    }


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> dict[str, Any]:
    """Return the processor's name, the cores for this process, and the GPUs' names."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
    }


def git_commit() -> str | None:
    """Return the commit of the working directory; None without one, or if git takes over 1 s."""
    return _output_of("git", "rev-parse", "--verify", "HEAD")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        next(iter(names), None)
        or _output_of("sysctl", "-n", "machdep.cpu.brand_string")
        or platform.machine()
    )


def _output_of(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=1, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
