"""What steps cost on this machine, in time and memory."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd.profiler import profile

from egtrain.build import Data, build_run, summary_of, worker_state_bytes
from egtrain.config.schedule import PostLocalConfig
from egtrain.config.schema import Config, InitConfig
from egtrain.run import Run
from egtrain.train import take_step
from egtrain.workers import Ranks

LEARNING_RATE = 1e-3
"""A small rate keeps the weights finite for every preset; the time does not depend on it."""


def estimated_cost(config: Config, data: Data, ranks: Ranks, processes: int) -> tuple[float, int]:
    """Return seconds per step and bytes of a process's tensors, from a few steps of one worker."""
    one = config.model_copy(
        update={
            "workers": 1,
            "steps": 1_000_000,
            "compile": False,
            "post_local": PostLocalConfig(),
            "init": InitConfig(),
            "schedule": config.schedule.model_copy(update={"shorten_warmup": True}),
        }
    )
    run, most = with_peak_bytes(lambda: warmed_up(one, ranks, data), ranks)
    cycle = run.extrapolated_steps.step
    seconds = seconds_taken(lambda: take_steps(run, cycle), ranks) / cycle
    share = config.workers // processes
    return seconds * share, most + (share - 1) * worker_state_bytes(
        config, summary_of(data).outputs
    )


def warmed_up(config: Config, ranks: Ranks, data: Data) -> Run:
    """Return a run after one cycle of steps, when everything is allocated and compiled."""
    run = build_run(config, ranks, data)
    run.model.train()
    take_steps(run, max(2, run.extrapolated_steps.step))
    return run


def take_steps(run: Run, count: int) -> None:
    """Make `count` updates."""
    for _ in range(count):
        take_step(run, LEARNING_RATE)


def seconds_taken(action: Callable[[], object], ranks: Ranks) -> float:
    """Return how long an action takes; a GPU's time is taken by its own clock."""
    if ranks.device.type != "cuda":
        start = time.perf_counter()
        action()
        return time.perf_counter() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    action()
    events[0].record()
    action()
    events[1].record()
    torch.cuda.synchronize()
    return float(events[0].elapsed_time(events[1])) / 1000


def with_peak_bytes(make: Callable[[], Run], ranks: Ranks) -> tuple[Run, int]:
    """Return what `make` returns, and by how much it raised the peak memory of tensors."""
    if ranks.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return make(), torch.cuda.max_memory_allocated() - before
    with quiet_standard_error(), profile(profile_memory=True) as profiled:
        made = make()
    held = most = 0
    for event in profiled.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return made, most


@contextmanager
def quiet_standard_error() -> Iterator[None]:
    """Silence what C++ prints: torch 2.13 reports each start of its profiler."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
