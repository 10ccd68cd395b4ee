"""ResNet-8 on CIFAR-10 as a task file: what `--preset resnet8-sgd` trains, written by a user.

egtrain train --task docs/cifar_resnet8.py --preset resnet8-sgd --set task.folder=DIR
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

MEAN = torch.tensor([125.3, 123.0, 113.9]).view(3, 1, 1)
STD = torch.tensor([63.0, 62.1, 66.7]).view(3, 1, 1)


class Block(nn.Module):
    """Two convolutions with a shortcut, which pads with zeros where the shape changes."""

    def __init__(self, before, width, stride):
        super().__init__()
        self.first = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        self.stride = stride

    def forward(self, x):
        y = F.relu(self.first_norm(self.first(x)), inplace=True)
        y = self.second_norm(self.second(y))
        if self.stride > 1:
            x = F.avg_pool2d(x, 1, 2)  # every other pixel, with a gradient that is channels-last
            x = F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        return F.relu(y + x, inplace=True)


def model(width: int = 16):
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        nn.AvgPool2d(8),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return net


class Streamed(Dataset):
    """The same images one at a time, as where a data set does not fit into memory."""

    def __init__(self, images, labels, training):
        self.images, self.labels, self.training = images, labels, training

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if self.training:
            top, left = torch.randint(9, (2,)).tolist()
            image = F.pad(image, (4, 4, 4, 4))[:, top : top + 32, left : left + 32]
            if torch.rand(()) < 0.5:
                image = image.flip(2)
        return (image.float() - MEAN) / STD, self.labels[index]


def dataset(split, folder: str = "data", stream: bool = False):
    if split == "validation":
        return None
    names = [f"data_batch_{n}" for n in range(1, 6)] if split == "train" else ["test_batch"]
    files = [Path(folder, "cifar-10-batches-bin", f"{name}.bin") for name in names]
    rows = torch.cat(
        [torch.frombuffer(bytearray(f.read_bytes()), dtype=torch.uint8) for f in files]
    )
    rows = rows.view(-1, 3073)
    images, labels = rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()
    return Streamed(images, labels, split == "train") if stream else TensorDataset(images, labels)


def loss(model, batch):
    images, labels = batch
    if images.dtype == torch.uint8:  # from the TensorDataset: a batch at once is much faster
        if model.training:
            images = augmented(images)
        images = (images.float() - MEAN.to(images.device)) / STD.to(images.device)
        images = images.contiguous(memory_format=torch.channels_last)
    logits = model(images).float()
    accuracy = (logits.argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels), {"accuracy": accuracy}


def augmented(images):
    """Crop each image at random from a border of four black pixels, and flip half of them."""
    n, place = len(images), images.device
    shifts = torch.randint(9, (2, n, 1), device=place)
    rows, columns = shifts + torch.arange(32, device=place)
    columns = torch.where(torch.rand(n, 1, device=place) < 0.5, columns.flip(1), columns)
    numbers = torch.arange(n, device=place)[:, None, None]
    padded = F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1).contiguous()
    return padded[numbers, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
