"""Measure how fast `resnet-sgd` trains beside the usual kind of PyTorch loop, in samples/s; for
docs/results.md.

python docs/measure_speed.py --data-dir DIR
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from egtrain.bench import median_interval
from egtrain.build import build_run, load_data
from egtrain.config.files import load_config
from egtrain.config.schema import Config
from egtrain.models.resnet import ResNet
from egtrain.run import Run
from egtrain.train import take_step
from egtrain.workers import Ranks


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def run_for(data_dir: str, workers: int, *settings: str) -> Run:
    config = load_config("resnet-sgd", [f"data.dir={data_dir}", f"workers={workers}", *settings])
    run = build_run(config, Ranks())
    run.model.train()
    return run


class Images(Dataset[tuple[torch.Tensor, int]]):
    """CIFAR-10 in the usual way: one image at a time, padded, cropped, flipped and normalised."""

    def __init__(self, config: Config) -> None:
        data = load_data(config)
        self.images = data.x_train.permute(0, 3, 1, 2).contiguous()
        self.labels = data.y_train
        self.mean = torch.tensor(data.mean).view(3, 1, 1)
        self.std = torch.tensor(data.std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = nn.functional.pad(self.images[index], (4, 4, 4, 4))
        top, left = torch.randint(9, (2,)).tolist()
        image = image[:, top : top + 32, left : left + 32]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        return (image.float() / 255 - self.mean) / self.std, int(self.labels[index])


def measure(data_dir: str, workers: int, steps: int, settings: list[str]) -> None:
    run = run_for(data_dir, workers, *settings)
    config = load_config("resnet-sgd", [f"data.dir={data_dir}"])
    model = ResNet(20, 16, 10)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    batches = iter(DataLoader(Images(config), batch_size=128, shuffle=True))

    def plain_step() -> None:
        images, labels = next(batches)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    take_step(run, 0.1)
    plain_step()
    ratios = [
        sum(seconds(plain_step) for _ in range(workers)) / seconds(lambda: take_step(run, 0.1))
        for _ in range(steps)
    ]
    median, low, high = median_interval(ratios)
    print(
        f"samples/s of resnet-sgd ({' '.join(settings)}) / plain fp32 loop: {median:.3f} "
        f"[{low:.3f}, {high:.3f}]"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True, type=lambda path: str(Path(path).absolute()))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", help="as in egtrain train"
    )
    arguments = parser.parse_args()
    measure(arguments.data_dir, arguments.workers, arguments.steps, arguments.settings)
