"""The result of every reader of images, and the fixed order in which parts of data are taken."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SPLIT_SEED = 20_200_620
"""Fixed: all runs must hold out the same samples, or their results would not be comparable."""


class ImageArrays(NamedTuple):
    """Images, uint8 `[images, height, width, 3]`, and labels, int64 `[images]`, before a split."""

    x_train: NDArray[np.uint8]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.int64]
    classes: int
    x_validation: NDArray[np.uint8] | None = None
    """Where the data come with a validation part; not empty."""
    y_validation: NDArray[np.int64] | None = None


def fixed_order(count: int, seed: int) -> NDArray[np.intp]:
    """Return a permutation of `count` samples that never changes."""
    # PCG64's raw bits are the same in all NumPy versions; Generator.permutation may change.
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
