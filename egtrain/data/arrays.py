"""What every reader of image data returns, and the fixed order that parts of a data set are taken
in.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class ImageArrays(NamedTuple):
    """Images, uint8 `[images, height, width, 3]`, and labels, int64 `[images]`, before anything is
    held out.
    """

    x_train: NDArray[np.uint8]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.int64]
    classes: int


def fixed_order(count: int, seed: int) -> NDArray[np.intp]:
    """Return a permutation of `count` samples that is the same for ever."""
    # Raw bits of PCG64 never change between NumPy versions; Generator.permutation promises no such
    # thing.
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
