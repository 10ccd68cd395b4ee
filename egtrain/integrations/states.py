"""The state of an extrapolation in a framework's checkpoint, for every process."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from egtrain.optim import Extrapolation
from egtrain.optim.processes import process_count


def this_process() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    count = process_count()
    return dist.get_rank() if count > 1 else 0, count


def save_own(extrapolation: Extrapolation, folder: str | Path) -> None:
    """Save this process's state in a file of its own."""
    Path(folder).mkdir(parents=True, exist_ok=True)  # the first process may be behind
    torch.save(extrapolation.state_dict(), own_file(folder))


def load_own(extrapolation: Extrapolation, folder: str | Path) -> None:
    """Load what this process has saved.

    Raises:
        FileNotFoundError: it has saved nothing there.
        ValueError: the state belongs to another model, direction or process.
    """
    file = own_file(folder)
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: resume with as many processes as have saved the checkpoint, which "
            "must have been made with extrapolation"
        )
    extrapolation.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))


def own_file(folder: str | Path) -> Path:
    """Return where this process saves its state."""
    rank, _ = this_process()
    return Path(folder) / f"extrapolation-{rank}.pt"


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """Return on the first process the state of all, tensors on the CPU; elsewhere an empty one.

    Every process has to call it, with what `Extrapolation.state_dict` returned.
    """
    rank, count = this_process()
    if count == 1:
        return state
    worker_state: dict[str, list[torch.Tensor]] = {}
    for name, tensors in state["worker_state"].items():
        worker_state[name] = []
        for t in tensors:  # one at a time, to spare memory
            parts = [torch.empty_like(t) for _ in range(count)] if rank == 0 else None
            dist.gather(t, parts)
            if parts is not None:
                worker_state[name].append(torch.cat(parts).cpu())
    workers = list(range(count))
    return {**state, "workers": workers, "worker_state": worker_state} if rank == 0 else {}


def own_part(state: dict[str, Any]) -> dict[str, Any]:
    """Return this process's part of what `gathered` returned.

    Raises:
        ValueError: there were more or fewer processes.
    """
    rank, count = this_process()
    if not state["worker_state"]:
        return {**state, "workers": [rank]}
    if len(state["workers"]) != count:
        raise ValueError(
            f"the checkpoint's extrapolation state is that of {len(state['workers'])} processes, "
            f"but there are {count} now: resume with as many"
        )
    worker_state = {
        name: [t[rank : rank + 1] for t in tensors]
        for name, tensors in state["worker_state"].items()
    }
    return {**state, "workers": [rank], "worker_state": worker_state}
