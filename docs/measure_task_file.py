"""Measure what a task file costs beside the built-in task, and beside a plain DataLoader loop; for
docs/task-files.md.

python docs/measure_task_file.py --data-dir DIR [--loaders 1]
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from egtrain.bench import median_interval
from egtrain.build import build_run, native_precision
from egtrain.config.files import load_config
from egtrain.run import Run
from egtrain.task_file import load_task_file
from egtrain.train import take_step
from egtrain.workers import Ranks

TASK = load_task_file(Path(__file__).parent / "cifar_resnet8.py")
WORKERS, B = 2, 125


def run_of(preset: str, *settings: str, own: bool) -> Run:
    common = [f"workers={WORKERS}", f"worker_batch_size={B}", "steps=1000000", "threads=1"]
    config = load_config(preset, [*common, *settings], TASK if own else None)
    run = build_run(config, Ranks())
    run.model.train()
    return run


def plain_loop(folder: str, loaders: int) -> Callable[[], None]:
    """Return a step of the usual loop: the same net, data set and precision, a DataLoader."""
    module: Any = TASK.module
    torch.manual_seed(0)
    model = module.model().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    images: Dataset[Any] = module.dataset("train", folder=folder, stream=True)
    loader = DataLoader(images, batch_size=B, shuffle=True, num_workers=loaders, drop_last=True)
    batches: Iterator[Any] = itertools.chain.from_iterable(itertools.repeat(loader))
    low = native_precision("auto", torch.device("cpu")) == "bf16"

    def step() -> None:
        x, y = next(batches)
        x = x.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss, _ = module.loss(model, (x, y))
        loss.backward()
        optimizer.step()

    return step


def seconds(action: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        action()
    return time.perf_counter() - start


def ratio(name: str, one: Callable[[], object], other: Callable[[], object], rounds: int) -> None:
    """Print how fast `one` is beside `other`, by interleaved stretches of 20 steps."""
    for action in (one, other):
        seconds(action, 10)
    ratios = [seconds(other, 20) / seconds(one, 20) for _ in range(rounds)]
    middle, low, high = median_interval(ratios)
    print(f"{name}: {middle:.3f} [{low:.3f}, {high:.3f}] of its speed, {rounds} rounds")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--loaders", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    folder = f"task.folder={given.data_dir}"
    built_in = run_of("resnet8-sgd", f"data.dir={given.data_dir}", own=False)
    tensors = run_of("sgd", folder, own=True)
    ratio(
        "tensors, beside the built-in task",
        lambda: take_step(tensors, 0.01),
        lambda: take_step(built_in, 0.01),
        given.rounds,
    )
    for loaders in dict.fromkeys([0, given.loaders]):
        streamed = run_of("sgd", folder, "task.stream=true", f"data.loaders={loaders}", own=True)
        plain = plain_loop(given.data_dir, loaders)
        ratio(
            f"{loaders} loaders, beside a plain DataLoader loop",
            lambda run=streamed: take_step(run, 0.01),  # type: ignore[misc]
            lambda step=plain: [step() for _ in range(WORKERS)],  # type: ignore[misc]
            given.rounds,
        )


if __name__ == "__main__":
    main()
