"""Predict a number from the columns of a table with a small multilayer perceptron.

egtrain train --task tabular_regression.py --preset eg --batch-size 256 \
    --set worker_batch_size=32 --set optimizer.lr=0.02 --set precision=fp32 --set threads=1 \
    --epochs 20 --output runs/table

Add --set task.csv=FILE for a table of yours: numbers under a line of names, and in the last column
what is to be predicted.
"""

import csv as csv_files
from functools import lru_cache

import torch
from torch import nn
from torch.utils.data import TensorDataset

metric = "mae"
higher_is_better = False  # it is an error


def friedman(rows=10_000, columns=10, noise=1.0):
    """Friedman's first problem (1991): five columns matter, and two of these only linearly."""
    random = torch.Generator().manual_seed(0)
    x = torch.rand(rows, columns, generator=random)
    y = 10 * torch.sin(torch.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
    y += 10 * x[:, 3] + 5 * x[:, 4] + noise * torch.randn(rows, generator=random)
    return torch.cat([x, y[:, None]], dim=1)


@lru_cache
def splits(csv):
    """Return the rows for training, validation and test: 70, 15 and 15 % of them, shuffled."""
    if csv:
        with open(csv, newline="") as file:
            next(reader := csv_files.reader(file))
            table = torch.tensor([[float(cell) for cell in row] for row in reader])
    else:
        table = friedman()
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    train, validation, test = table[order].tensor_split(
        [len(table) * 70 // 100, len(table) * 85 // 100]
    )
    return {"train": train, "validation": validation, "test": test}


class Regression(nn.Module):
    """A perceptron that knows the scale of its table, so it takes and gives plain numbers."""

    def __init__(self, table, width, layers):
        super().__init__()
        columns = table.shape[1] - 1
        self.register_buffer("mean", table.mean(dim=0))
        self.register_buffer("std", table.std(dim=0).clamp(min=1e-6))
        first = [nn.Linear(columns, width), nn.ReLU()]
        rest = [part for _ in range(layers - 1) for part in (nn.Linear(width, width), nn.ReLU())]
        self.net = nn.Sequential(*first, *rest, nn.Linear(width, 1))

    def forward(self, x):
        x = (x - self.mean[:-1]) / self.std[:-1]
        return self.mean[-1] + self.std[-1] * self.net(x).squeeze(1)


def model(csv: str = "", width: int = 64, layers: int = 2):
    return Regression(splits(csv)["train"], width, layers)


def dataset(split, csv: str = ""):
    table = splits(csv)[split]
    return TensorDataset(table[:, :-1], table[:, -1])  # tensors: they live on the device


def loss(model, batch):
    x, y = batch
    error = model(x) - y
    # Metrics are averaged over batches. A mean of absolute errors allows that; a root, such as that
    # of the mean square, does not.
    return (error / model.std[-1]).square().mean(), {"mae": error.abs().mean()}
