"""Measure how many mini-batch gradients a second several runs take that share a device; for
docs/results.md.

python docs/measure_sharing.py --preset resnet8-eg --processes 12 --set precision=fp32
"""

import argparse
import multiprocessing
import time
from multiprocessing.synchronize import Barrier

import torch

from egtrain.build import build_run
from egtrain.config.files import load_config
from egtrain.config.schema import Config
from egtrain.data.images import ImageData
from egtrain.ranks.distributed import pick_device
from egtrain.statistics import HostCopy
from egtrain.train import take_step
from egtrain.workers import Ranks


def noise(count: int = 10_000) -> ImageData:
    """Images of CIFAR-10's shape; how long a step takes does not depend on what they show."""
    x, y = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (count,))
    third = (1 / 3, 1 / 3, 1 / 3)
    return ImageData(
        x_train=x,
        y_train=y,
        x_validation=x[:0],
        y_validation=y[:0],
        x_test=x[:1],
        y_test=y[:1],
        classes=10,
        mean=third,
        std=third,
        ceiling=None,
        digest="",
    )


def gradients_a_second(config: Config, seconds: float, ready: Barrier) -> float:
    """Train as the loop does, from the moment when all processes have warmed up."""
    run = build_run(config, Ranks(device=pick_device(config.device)), noise())
    run.model.train()
    for _ in range(2):
        take_step(run, 0.01).tolist()
    ready.wait()
    start, steps, last = time.perf_counter(), 0, HostCopy(torch.zeros(1))
    while time.perf_counter() - start < seconds:
        unread = HostCopy(take_step(run, 0.01))
        last.read()
        last, steps = unread, steps + 1
    last.read()
    return steps * config.workers / (time.perf_counter() - start)


def measure(
    config: Config, seconds: float, ready: Barrier, results: "multiprocessing.SimpleQueue[float]"
) -> None:
    results.put(gradients_a_second(config, seconds, ready))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="resnet8-eg")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.5)
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", help="as in egtrain train"
    )
    arguments = parser.parse_args()
    config = load_config(arguments.preset, ["threads=1", *arguments.settings])
    spawning = multiprocessing.get_context("spawn")
    ready, results = spawning.Barrier(arguments.processes), spawning.SimpleQueue()
    processes = [
        spawning.Process(target=measure, args=(config, arguments.seconds, ready, results))
        for _ in range(arguments.processes)
    ]
    for process in processes:
        process.start()
    rates = [results.get() for _ in processes]
    what = " ".join([arguments.preset, *arguments.settings])
    print(f"{what}: {sum(rates):.0f} gradients/s over {len(rates)} processes")
