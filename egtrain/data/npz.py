"""A user's own images, from an .npz file with `x_train`, `y_train`, `x_test` and `y_test`."""

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from egtrain.data.arrays import ImageArrays
from egtrain.errors import DataError

Bytes = NDArray[np.uint8]
KEYS = ("x_train", "y_train", "x_test", "y_test")
SMALLEST = 8
"""Pixels; a network that halves the size twice needs that many."""


def read_npz(path: Path) -> ImageArrays:
    """Read and check the four arrays.

    The file's images are uint8 `[images, height, width, 3]`, `[images, 3, height, width]` or grey
    `[images, height, width]` (also with one channel); they come back as uint8 `[images, height,
    width, 3]`. Labels are integers from 0, `[images]`. Nothing is unpickled.

    Raises:
        DataError: it names the file, the array, what was found and what to do.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            missing = [key for key in KEYS if f"{key}.npy" not in archive.namelist()]
            if missing:
                raise DataError(
                    f"{path}: {', '.join(missing)} missing; write it with"
                    " numpy.savez(FILE, x_train=…, y_train=…, x_test=…, y_test=…)"
                )
            x_train, y_train, x_test, y_test = (_read_array(path, archive, key) for key in KEYS)
    except (
        OSError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as problem:
        raise DataError(
            f"{path}: not a readable .npz file ({problem}); write it again with numpy.savez or "
            "numpy.savez_compressed"
        ) from problem

    train, test = _colour(path, "x_train", x_train), _colour(path, "x_test", x_test)
    if train.shape[1:] != test.shape[1:]:
        raise DataError(
            f"{path}: x_train has images of {_size(train)} and x_test of {_size(test)} (height x "
            "width); bring them to one size"
        )
    for key, labels, images in (("train", y_train, train), ("test", y_test, test)):
        if labels.shape != (len(images),):
            raise DataError(
                f"{path}: y_{key} has shape {list(labels.shape)} where x_{key} holds "
                f"{len(images):,} images; give one label for each image, with shape "
                f"[{len(images)}]"
            )
    lowest, classes = int(y_train.min()), int(y_train.max()) + 1
    for key, labels in (("y_train", y_train), ("y_test", y_test)):
        if int(labels.min()) < 0:
            raise DataError(
                f"{path}: {key} has the label {labels.min()}, but classes are numbered from 0; "
                "number them 0, 1, 2 … in the same way in y_train and y_test"
            )
        if int(labels.min()) < lowest or int(labels.max()) >= classes:
            raise DataError(
                f"{path}: {key} has labels from {labels.min()} to {labels.max()} but y_train "
                f"has classes {lowest} to {classes - 1}; number the classes 0, 1, 2 … "
                "in the same way in both"
            )
    if lowest > 0:
        raise DataError(
            f"{path}: the labels begin with {lowest}, but classes are numbered from 0; store "
            f"y_train - {lowest} and y_test - {lowest}"
        )
    if not 2 <= classes <= len(train):
        raise DataError(
            f"{path}: the highest label in y_train is {classes - 1} for {len(train):,} images;"
            " number the classes 0, 1, 2 … without large gaps, and have at least two"
        )
    return ImageArrays(train, y_train.astype(np.int64), test, y_test.astype(np.int64), classes)


def _read_array(path: Path, archive: zipfile.ZipFile, key: str) -> NDArray[np.integer]:
    """Read one array; its header is checked first, so that a wrong or false one costs no memory."""
    name = f"{key}.npy"
    with archive.open(name) as member:
        shape, dtype, header = _read_header(path, key, member)
    wrong = _wrong_images(key, dtype) if key[0] == "x" else _wrong_labels(key, shape, dtype)
    if wrong:
        raise DataError(f"{path}: {wrong}")
    if 0 in shape or not shape:
        raise DataError(
            f"{path}: {key} has shape {list(shape)} and so has no images; store at least one"
        )
    declared = math.prod(shape) * dtype.itemsize + header
    if declared != archive.getinfo(name).file_size:
        raise DataError(
            f"{path}: {key} declares {declared:,} bytes but has "
            f"{archive.getinfo(name).file_size:,}; the file is damaged, so write it again"
        )
    with archive.open(name) as member:
        try:
            array: NDArray[np.integer] = np.lib.format.read_array(member, allow_pickle=False)
        except ValueError as problem:
            raise DataError(
                f"{path}: {key} cannot be read ({problem}); write the file again"
            ) from problem
    return array


def _wrong_images(key: str, dtype: np.dtype[np.generic]) -> str:
    """Say what is wrong with the type of images, and how to convert them; empty if nothing is."""
    if dtype == np.uint8:
        return ""
    advice = f"{key}.astype('uint8') if they lie between 0 and 255"
    if dtype.kind == "f":
        advice = (
            f"(255 * {key}).round().astype('uint8') if they lie between 0 and 1, "
            f"{key}.round().astype('uint8') if they lie between 0 and 255"
        )
    return f"{key} holds {dtype} where uint8 from 0 to 255 is expected; convert with {advice}"


def _wrong_labels(key: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> str:
    """Say what is wrong with the labels, and how to convert them; empty if nothing is."""
    if len(shape) == 2 and dtype.kind in "iufb":
        if shape[1] == 1:
            return f"{key} is a column of labels, {list(shape)}; convert with {key}.ravel()"
        return f"{key} holds one-hot labels, {list(shape)}; convert with {key}.argmax(1)"
    if dtype.kind in "iu":
        return ""
    advice = f"{key}.astype('int64')"
    if dtype.kind in "USO":
        advice = f"numpy.searchsorted(numpy.unique(y_train), {key}), which numbers them by name"
    return f"{key} holds {dtype} where integers are expected; convert with {advice}"


def _read_header(
    path: Path, key: str, member: IO[bytes]
) -> tuple[tuple[int, ...], np.dtype[np.generic], int]:
    try:
        version = np.lib.format.read_magic(member)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(member)
    except ValueError as problem:
        raise DataError(
            f"{path}: {key} is not an array in NumPy's format ({problem}); write the file again"
        ) from problem
    return shape, dtype, member.tell()


def _colour(path: Path, key: str, images: NDArray[np.integer]) -> Bytes:
    """Bring images to `[images, height, width, 3]`."""
    array = images.astype(np.uint8, copy=False)
    if array.ndim == 3:
        array = array[..., None]
    elif array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[3] not in (1, 3):
        raise DataError(
            f"{path}: {key} has shape {list(images.shape)}; expected [images, height, width, 3],"
            " [images, 3, height, width] or grey [images, height, width]"
        )
    if min(array.shape[1:3]) < SMALLEST:
        raise DataError(
            f"{path}: {key} has images of {_size(array)} pixels; at least {SMALLEST} x {SMALLEST} "
            "are needed, so enlarge or pad them"
        )
    return np.repeat(array, 3, axis=3) if array.shape[3] == 1 else np.ascontiguousarray(array)


def _size(images: Bytes) -> str:
    return f"{images.shape[1]} x {images.shape[2]}"
