"""Image classification data as plain tensors: one function that finds, checks and splits any of the
data sets.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from egtrain.data.arrays import ImageArrays
from egtrain.data.cifar import CIFAR10, CIFAR100, read_layout
from egtrain.data.fetch import data_folders, find_or_download, locate
from egtrain.data.npz import read_npz
from egtrain.data.synthetic_images import make_synthetic_images
from egtrain.errors import UsageError

_SPLIT_SEED = 20_200_620
"""Fixed: which images are held out must not depend on the run, or accuracies of two seeds would not
be comparable."""


@dataclass(frozen=True)
class ImageData:
    """A data set on the CPU. Images are uint8 `[images, height, width, 3]`, labels int64
    `[images]`.
    """

    x_train: Tensor
    y_train: Tensor
    x_validation: Tensor
    """May hold no image."""
    y_validation: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    mean: tuple[float, float, float]
    """Mean of each channel of the training pixels, scaled to [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation likewise; at least 1/255, so that a constant channel can be
    standardised."""
    ceiling: float | None
    """Highest expected test accuracy, as a fraction, where it is known: what the labels' noise
    leaves."""
    digest: str
    """SHA-256 over all arrays with their shapes: equal digests mean equal data in equal splits."""


def load_images(
    name: str,
    *,
    data_dir: Path | None,
    offline: bool,
    seed: int,
    train_samples: int | None,
    validation: int,
) -> ImageData:
    """Load `cifar10`, `cifar100`, `synthetic` or `npz:FILE`, and hold out `validation` training
    images.

    The validation images, and `train_samples` of the rest, are the first of one fixed permutation,
    so that smaller training sets are subsets of larger ones; `seed`, the run's, therefore changes
    nothing. Data are looked for in `data_dir`, $EGTRAIN_DATA and the user cache, then downloaded
    unless `offline`. Raises `DataError` for data that are missing or damaged, `UsageError` for an
    unknown name or an impossible split.
    """
    del seed
    ceiling: float | None = None
    if name in _CIFAR:
        folder, layout = find_or_download(_CIFAR[name], data_dir, offline)
        arrays = read_layout(_CIFAR[name], folder, layout)
    elif name == "synthetic":
        drawn = make_synthetic_images()
        arrays, ceiling = drawn.arrays, drawn.ceiling
    elif name.startswith("npz:"):
        arrays = read_npz(_npz_path(name, data_dir))
    else:
        raise _unknown(name)
    return _split(name, arrays, ceiling, train_samples, validation)


def locate_images(name: str, *, data_dir: Path | None, offline: bool) -> str:
    """Say in a few words where `load_images` would take the data from; reads no data and downloads
    nothing.

    Raises `DataError` where a data set on disk lacks files, `UsageError` for an unknown name.
    """
    if name == "synthetic":
        return "made when needed"
    if name.startswith("npz:"):
        path = _npz_path(name, data_dir)
        return f"found: {path}" if path.is_file() else f"missing: {path}"
    if name not in _CIFAR:
        raise _unknown(name)
    return locate(_CIFAR[name], data_dir, offline)


_CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def _npz_path(name: str, data_dir: Path | None) -> Path:
    """Return the file as it is named, or else within the first of the data folders that has it."""
    path = Path(name.removeprefix("npz:")).expanduser()
    places = [path, *(folder / path for folder in data_folders(data_dir))]
    if data_dir is not None:
        places.append(data_dir / path.name)  # it has moved there
    return next((place for place in places if place.is_file()), path)


def _unknown(name: str) -> UsageError:
    return UsageError(f"unknown image data '{name}'; use cifar10, cifar100, synthetic or npz:FILE")


def _split(
    name: str,
    arrays: ImageArrays,
    ceiling: float | None,
    train_samples: int | None,
    validation: int,
) -> ImageData:
    count = len(arrays.x_train)
    if not 0 <= validation < count:
        raise UsageError(
            f"data.validation: {validation} is not possible, as {name} has {count:,} training "
            "images of which one must"
            f" remain; use 0 to {count - 1}"
        )
    if train_samples is not None and not 1 <= train_samples <= count - validation:
        raise UsageError(
            f"data.train_samples: {train_samples} is not possible, as {name} has {count:,} "
            "training images of which"
            f" {validation:,} are held out; use 1 to {count - validation}"
        )
    kept, held_out = np.arange(count), np.arange(0)
    if validation or train_samples is not None:
        order = _fixed_permutation(count)
        end = count if train_samples is None else validation + train_samples
        held_out, kept = np.sort(order[:validation]), np.sort(order[validation:end])
    whole = len(kept) == count
    x_train = torch.from_numpy(arrays.x_train if whole else arrays.x_train[kept])
    y_train = torch.from_numpy(arrays.y_train if whole else arrays.y_train[kept])
    x_validation = torch.from_numpy(arrays.x_train[held_out])
    y_validation = torch.from_numpy(arrays.y_train[held_out])
    x_test, y_test = torch.from_numpy(arrays.x_test), torch.from_numpy(arrays.y_test)
    mean, std = _channel_statistics(x_train)
    return ImageData(
        x_train=x_train,
        y_train=y_train,
        x_validation=x_validation,
        y_validation=y_validation,
        x_test=x_test,
        y_test=y_test,
        classes=arrays.classes,
        mean=mean,
        std=std,
        ceiling=ceiling,
        digest=_digest(x_train, y_train, x_validation, y_validation, x_test, y_test),
    )


def _fixed_permutation(count: int) -> NDArray[np.intp]:
    # Raw bits of PCG64 never change between NumPy versions; Generator.permutation promises no such
    # thing.
    return np.argsort(np.random.PCG64(_SPLIT_SEED).random_raw(count), kind="stable")


def _channel_statistics(
    images: Tensor,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    total = torch.zeros(images[0].numel(), dtype=torch.float64)
    squares = torch.zeros_like(total)
    # 256 squares of a byte still add up exactly in float32, so the result is the same on any number
    # of threads.
    for part in torch.split(images.flatten(1), 256):
        values = part.to(torch.float32)
        total += values.sum(0)
        squares += values.square_().sum(0)
    total, squares = total.view(-1, 3).sum(0), squares.view(-1, 3).sum(0)
    count = images.numel() // 3
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=1.0).sqrt() / 255
    red, green, blue = (mean / 255).tolist()
    red_std, green_std, blue_std = std.tolist()
    return (red, green, blue), (red_std, green_std, blue_std)


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
