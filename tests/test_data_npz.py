"""A user's own images: every layout is understood, and every mistake is answered with what to
do.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from egtrain.data.images import ImageData, load_images
from egtrain.errors import DataError


def arrays(**changes: Any) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    good: dict[str, Any] = {
        "x_train": generator.integers(0, 256, (12, 8, 10, 3), np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": generator.integers(0, 256, (6, 8, 10, 3), np.uint8),
        "y_test": np.arange(6) % 3,
    }
    return good | changes


def write(path: Path, contents: dict[str, Any]) -> Path:
    np.savez_compressed(path, **contents)
    return path


def load(path: Path) -> ImageData:
    return load_images(f"npz:{path}", data_dir=None, offline=True, train_samples=None, validation=0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "own.npz"


def test_channels_last_channels_first_and_column_order_are_the_same_data(path: Path) -> None:
    good = arrays()
    expected = load(write(path, good))
    assert np.array_equal(expected.x_train.numpy(), good["x_train"])
    assert expected.classes == 3
    first = {
        key: np.moveaxis(value, 3, 1) if key[0] == "x" else value for key, value in good.items()
    }
    assert load(write(path, first)).digest == expected.digest
    by_columns = {key: np.asfortranarray(value) for key, value in good.items()}
    assert load(write(path, by_columns)).digest == expected.digest


@pytest.mark.parametrize("shape", [(12, 8, 10), (12, 8, 10, 1), (12, 1, 8, 10)])
def test_grey_images_become_three_equal_channels(path: Path, shape: tuple[int, ...]) -> None:
    grey = np.random.default_rng(1).integers(0, 256, (12, 8, 10), np.uint8)
    data = load(write(path, arrays(x_train=grey.reshape(shape))))
    assert data.x_train.shape == (12, 8, 10, 3)
    for channel in range(3):
        assert np.array_equal(data.x_train[..., channel].numpy(), grey)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint64, np.int32, ">i8"])
def test_labels_of_every_integer_type_are_taken(path: Path, kind: str) -> None:
    data = load(write(path, arrays(y_train=(np.arange(12) % 3).astype(kind))))
    assert data.y_train.dtype == torch.int64
    assert data.y_train.tolist() == [0, 1, 2] * 4


WRONG = [
    (
        {"x_train": np.zeros((12, 8, 10, 3), np.float32)},
        r"x_train holds float32 .* \(255 \* x_train\)\.round\(\)",
    ),
    (
        {"x_test": np.zeros((6, 8, 10, 3), np.int64)},
        r"x_test holds int64 .* x_test\.astype\('uint8'\)",
    ),
    ({"x_train": np.array([None] * 12)}, "x_train holds object"),
    ({"y_train": np.arange(12) / 2}, r"y_train holds float64 .* y_train\.astype\('int64'\)"),
    (
        {"y_test": np.array(list("abcdef"))},
        r"y_test holds <U1 where integers are expected; convert with "
        r"numpy\.searchsorted\(numpy\.unique\(y_train\), y_test\)",
    ),
    ({"y_test": np.array([None] * 6)}, "y_test holds object where integers"),
    ({"y_train": np.ones(12, bool)}, "y_train holds bool where integers"),
    (
        {"x_train": np.zeros((12, 8, 10, 4), np.uint8)},
        r"x_train has shape \[12, 8, 10, 4\]; expected",
    ),
    ({"x_train": np.zeros((12, 80), np.uint8)}, r"x_train has shape \[12, 80\]; expected"),
    ({"x_train": np.zeros((), np.uint8)}, r"x_train has shape \[\] and so has no images"),
    (
        {"x_train": np.zeros((0, 8, 10, 3), np.uint8)},
        r"x_train has shape \[0, 8, 10, 3\] and so has no images",
    ),
    ({"y_train": np.arange(11) % 3}, r"y_train has shape \[11\] where x_train holds 12 images"),
    (
        {"y_train": (np.arange(12) % 3)[:, None]},
        r"y_train is a column of labels, \[12, 1\]; convert with y_train\.ravel\(\)$",
    ),
    (
        {"y_train": np.eye(3)[np.arange(12) % 3]},
        r"y_train holds one-hot labels, \[12, 3\]; convert with y_train\.argmax\(1\)$",
    ),
    ({"y_test": np.eye(3, dtype=bool)[np.arange(6) % 3]}, r"convert with y_test\.argmax\(1\)$"),
    ({"y_test": np.eye(3, dtype=int)[np.arange(6) % 3]}, r"convert with y_test\.argmax\(1\)$"),
    ({"y_test": np.arange(7) % 3}, r"y_test has shape \[7\] where x_test holds 6 images"),
    (
        {"x_test": np.zeros((6, 10, 8, 3), np.uint8)},
        r"images of 8 x 10 and x_test of 10 x 8 .* one size",
    ),
    ({"x_train": np.zeros((12, 7, 10, 3), np.uint8)}, "images of 7 x 10 pixels; at least 8 x 8"),
    ({"x_train": np.zeros((12, 10, 7), np.uint8)}, "images of 10 x 7 pixels; at least 8 x 8"),
    (
        {"y_train": np.arange(12) % 3 - 1},
        "y_train has the label -1, but classes are numbered from 0",
    ),
    (
        {"y_train": np.arange(12) % 10 + 1, "y_test": np.arange(6) + 1},
        r"the labels begin with 1, but classes are numbered from 0; store y_train - 1 and "
        r"y_test - 1$",
    ),
    (
        {"y_train": np.arange(12) % 2 + 5, "y_test": np.arange(6) % 2 + 5},
        "the labels begin with 5, .* store y_train - 5 and y_test - 5$",
    ),
    (
        {"y_test": np.arange(6) - 1},
        "y_test has the label -1, but classes are numbered from 0",
    ),
    (
        {"y_test": np.arange(6) % 4},
        "y_test has labels from 0 to 3 but y_train has classes 0 to 2",
    ),
    (
        {"y_train": np.arange(12) % 3 + 1},
        "y_test has labels from 0 to 2 but y_train has classes 1 to 3; .* in the same way in both",
    ),
    ({"y_train": np.arange(12) * 1000}, "highest label in y_train is 11000 for 12 images"),
    (
        {"y_train": np.array([0, 2**63] * 6, np.uint64)},
        "highest label in y_train is 9223372036854775808",
    ),
    ({"y_train": np.zeros(12, np.int64), "y_test": np.zeros(6, np.int64)}, "have at least two"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_each_mistake_is_one_sentence_with_the_file_and_the_array(
    path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(write(path, arrays(**changes)))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_arrays_are_all_named(path: Path) -> None:
    contents = arrays()
    del contents["x_test"], contents["y_test"]
    with pytest.raises(DataError, match=r"x_test, y_test missing; write it with numpy\.savez"):
        load(write(path, contents))


def test_a_file_that_is_not_there_and_one_that_is_something_else(
    path: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"no such file or folder, here or in .* npz:images.npz"):
        load(path)
    path.write_bytes(b"not a zip archive")
    with pytest.raises(DataError, match=r"not a readable \.npz file"):
        load(path)
    with pytest.raises(DataError, match=r"not a readable \.npz file"):
        load(tmp_path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"not a readable \.npz file"):
        load(tmp_path / "one.npy")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(path: Path, share: float) -> None:
    content = write(path, arrays()).read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"not a readable \.npz file"):
        load(path)


def test_a_flipped_bit_is_refused(path: Path) -> None:
    np.savez(path, **arrays())
    content = bytearray(path.read_bytes())
    content[1000] ^= 16
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a readable"):
        load(path)


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


def with_member(path: Path, name: str, content: bytes) -> Path:
    good = io.BytesIO()
    np.savez(good, **arrays())
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as target:
        for member in source.namelist():
            target.writestr(member, content if member == name else source.read(member))
    return path


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_an_array_that_carries_code_is_refused_and_the_code_has_not_run(
    path: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "the code has run"
    bomb = io.BytesIO()
    np.save(bomb, np.array([RunsCode(mark)] * 12), allow_pickle=True)
    np.load(io.BytesIO(bomb.getvalue()), allow_pickle=True)
    assert mark.exists()
    mark.unlink()
    for name in ("x_train.npy", "y_train.npy"):
        with pytest.raises(DataError, match="holds object"):
            load(with_member(path, name, bomb.getvalue()))
        with pytest.raises(DataError, match="not an array in NumPy's format"):
            load(with_member(path, name, pickle.dumps(RunsCode(mark))))
    assert not mark.exists()


def test_a_header_that_declares_a_huge_array_costs_no_memory(path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 8, 10, 3)}
    )
    with pytest.raises(
        DataError, match=r"x_train declares 263,\d{3},\d{3},\d{3},\d{3} bytes but has"
    ):
        load(with_member(path, "x_train.npy", header.getvalue() + bytes(100)))
