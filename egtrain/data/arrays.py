"""What every reader of image data returns."""

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
