"""Image classification data as plain tensors: one function finds, checks and splits any set."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from egtrain.data.arrays import SPLIT_SEED, ImageArrays, fixed_order
from egtrain.data.download import find_or_download
from egtrain.data.finding import note_of_part, require_own
from egtrain.data.folder import read_folder
from egtrain.data.npz import read_npz
from egtrain.data.sets import IMAGES
from egtrain.data.synthetic_images import make_synthetic_images
from egtrain.errors import UsageError


@dataclass(frozen=True)
class ImageData:
    """A data set on the CPU: uint8 images `[images, height, width, 3]`, int64 labels `[images]`."""

    x_train: Tensor
    y_train: Tensor
    x_validation: Tensor
    """May be empty."""
    y_validation: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    mean: tuple[float, float, float]
    """Mean of each channel of the training pixels, scaled to [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation likewise; at least 1/255, so that constant channels do no harm."""
    ceiling: float | None
    """Best possible test accuracy with these noisy labels, as a fraction, if it is known."""
    digest: str
    """SHA-256 over all arrays with their shapes: equal digests mean equal data in equal splits."""
    notes: tuple[str, ...] = ()
    """Notes for the user about the data, shown before training."""


def load_images(
    name: str,
    *,
    data_dir: Path | None,
    offline: bool,
    train_samples: int | None,
    validation: int,
    image_size: int | None = None,
) -> ImageData:
    """Load a public data set, `synthetic`, `npz:FILE` or `folder:DIR`, and hold out images.

    `validation` training images are held out; `image_size` is for folders, see `read_folder`.

    The validation images, then `train_samples` of the rest, are the first of one fixed permutation.
    So they are the same in every run, and smaller training sets are subsets of larger ones. Data
    are searched in `data_dir`, $EGTRAIN_DATA and the user cache, then downloaded unless `offline`.

    Raises:
        DataError: data are missing or damaged.
        UsageError: the name is unknown, or the split is impossible.
    """
    ceiling: float | None = None
    if name == "synthetic":
        drawn = make_synthetic_images()
        arrays, ceiling = drawn.arrays, drawn.ceiling
    elif name.startswith("npz:"):
        path = require_own(name, data_dir, "the path of an .npz file, as in --data npz:images.npz")
        arrays = read_npz(path)
    elif name.startswith("folder:"):
        form = "a folder with train/CLASS/*.jpg and test/CLASS/*.jpg, as in --data folder:flowers"
        arrays = read_folder(require_own(name, data_dir, form), image_size)
    elif name in IMAGES:
        arrays = IMAGES[name].read(find_or_download(IMAGES[name], data_dir, offline))
    else:
        raise UsageError(
            f"unknown image data '{name}'; use {', '.join(IMAGES)}, synthetic, npz:FILE or "
            "folder:DIR"
        )
    return _split(name, arrays, ceiling, train_samples, validation)


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
            f"images and one must remain; use 0 to {count - 1}"
        )
    if validation and arrays.x_validation is not None:
        raise UsageError(
            f"data.validation must be 0, because {name} has a validation part already: remove it"
        )
    if train_samples is not None and not 1 <= train_samples <= count - validation:
        raise UsageError(
            f"data.train_samples: {train_samples} is not possible, as {name} has {count:,} "
            f"training images of which {validation:,} are held out; use 1 to "
            f"{count - validation}, or null for all"
        )
    kept, held_out = np.arange(count), np.arange(0)
    if validation or train_samples is not None:
        order = fixed_order(count, SPLIT_SEED)
        end = count if train_samples is None else validation + train_samples
        held_out, kept = np.sort(order[:validation]), np.sort(order[validation:end])
    whole = len(kept) == count
    x_train = torch.from_numpy(arrays.x_train if whole else arrays.x_train[kept])
    y_train = torch.from_numpy(arrays.y_train if whole else arrays.y_train[kept])
    if arrays.x_validation is None or arrays.y_validation is None:
        x_validation = torch.from_numpy(arrays.x_train[held_out])
        y_validation = torch.from_numpy(arrays.y_train[held_out])
    else:
        x_validation = torch.from_numpy(arrays.x_validation)
        y_validation = torch.from_numpy(arrays.y_validation)
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
        notes=note_of_part(name, len(kept), count - validation, "images"),
    )


def _channel_statistics(
    images: Tensor,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    # Rows of an image, a few at a time, which stay in the processor's cache.
    rows = images.flatten(0, 1).flatten(1)
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    # Sums of 256 squared bytes are exact in float32, so the number of threads does not matter.
    for part in torch.split(rows, 256):
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
