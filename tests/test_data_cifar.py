"""CIFAR from either distribution: the same data, and no file that is damaged, altered or hostile is
accepted.
"""

import dataclasses
import hashlib
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from egtrain.data import images as images_module
from egtrain.data.cifar import CIFAR10, CIFAR100, BatchFile, Cifar, Layout, read_layout
from egtrain.data.images import ImageData, load_images
from egtrain.data.pickles import UnsafePickle, load_plain_pickle
from egtrain.errors import DataError

PER_CLASS = 2


def string(text: bytes) -> bytes:
    """A Python 2 string of protocol 2."""
    return (
        b"U" + bytes([len(text)]) + text
        if len(text) < 256
        else b"T" + struct.pack("<i", len(text)) + text
    )


def integer(value: int) -> bytes:
    return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)


def pickled_array(array: np.ndarray, kind: bytes = b"u1") -> bytes:
    """The opcodes with which NumPy under Python 2 wrote the official files."""
    rows, columns = array.shape
    state = b"(" + integer(1) + integer(rows) + integer(columns) + b"\x86"
    state += b"cnumpy\ndtype\n" + string(kind) + integer(0) + integer(1) + b"\x87R"
    state += (
        b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    )
    state += b"\x89" + string(array.tobytes()) + b"tb"
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        + integer(0)
        + b"\x85"
        + string(b"b")
        + b"\x87R"
        + state
    )


def pickled_batch(rows: np.ndarray, labels: dict[str, list[int]], kind: bytes = b"u1") -> bytes:
    """A batch as in the official pickled files."""
    content = b"\x80\x02}(" + string(b"batch_label") + string(b"training batch 1 of 5")
    for key, values in labels.items():
        content += (
            string(key.encode()) + b"](" + b"".join(integer(value) for value in values) + b"e"
        )
    return content + string(b"data") + pickled_array(rows, kind) + b"u."


def digest_of(content: bytes, algorithm: str) -> str:
    return hashlib.new(algorithm, content).hexdigest()


@dataclasses.dataclass
class Fake:
    """A tiny CIFAR in both layouts on disk, with the description that makes it the official one."""

    cifar: Cifar
    binary: Path
    pickled: Path
    rows: list[np.ndarray]
    labels: list[np.ndarray]


def make_fake(folder: Path, real: Cifar) -> Fake:
    """Write both distributions with `PER_CLASS` images of each class in each file."""
    generator = np.random.default_rng(0)
    files = len(real.layouts[0].files)
    count = PER_CLASS * real.classes
    rows = [generator.integers(0, 256, (count, 3072), np.uint8) for _ in range(files)]
    labels = [
        generator.permutation(np.arange(count) % real.classes).astype(np.uint8)
        for _ in range(files)
    ]
    layouts = []
    for layout in real.layouts:
        (folder / layout.folder).mkdir()
        written = []
        for file, pixels, classes in zip(layout.files, rows, labels, strict=True):
            if layout.pickled:
                keys = {real.label_key: classes.tolist()}
                if real.classes == 100:
                    keys["coarse_labels"] = (classes // 5).tolist()
                content = pickled_batch(pixels, keys)
            else:
                columns = (
                    [classes[:, None]]
                    if real.label_bytes == 1
                    else [classes[:, None] // 5, classes[:, None]]
                )
                content = np.concatenate([*columns, pixels], axis=1).tobytes()
            (folder / layout.folder / file.name).write_bytes(content)
            known = (
                digest_of(content, "md5" if layout.pickled else "sha256") if file.digest else None
            )
            written.append(BatchFile(file.name, count, len(content), known))
        layouts.append(Layout(layout.folder, layout.pickled, tuple(written[:-1]), (written[-1],)))
    cifar = dataclasses.replace(real, layouts=tuple(layouts))
    return Fake(cifar, folder / layouts[0].folder, folder / layouts[1].folder, rows, labels)


@pytest.fixture(params=[CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def fake(request: pytest.FixtureRequest, tmp_path: Path) -> Fake:
    return make_fake(tmp_path, request.param)


@pytest.fixture
def fake10(tmp_path: Path) -> Fake:
    return make_fake(tmp_path, CIFAR10)


def load_fake(fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ImageData:
    monkeypatch.setitem(images_module._CIFAR, "cifar10", fake.cifar)
    return load_images(
        "cifar10", data_dir=folder, offline=True, seed=0, train_samples=None, validation=0
    )


def test_both_layouts_give_the_images_that_were_written(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = load_fake(fake, fake.binary, monkeypatch)
    pickled = load_fake(fake, fake.pickled, monkeypatch)
    assert binary.digest == pickled.digest
    expected = np.concatenate(fake.rows[:-1]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(binary.x_train.numpy(), expected)
    assert np.array_equal(binary.y_train.numpy(), np.concatenate(fake.labels[:-1]))
    assert np.array_equal(
        pickled.x_test.numpy(), fake.rows[-1].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    )
    assert np.array_equal(pickled.y_test.numpy(), fake.labels[-1])
    assert binary.y_train.dtype == torch.int64
    assert binary.x_train.is_contiguous()


def test_a_folder_that_holds_the_distribution_and_the_distribution_itself_are_both_found(
    fake10: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = load_fake(fake10, fake10.binary.parent, monkeypatch)
    renamed = fake10.binary.rename(fake10.binary.with_name("some other name"))
    assert load_fake(fake10, renamed, monkeypatch).digest == parent.digest


def test_a_truncated_binary_file_is_named_with_both_sizes_and_the_fix(fake10: Fake) -> None:
    path = fake10.binary / "data_batch_3.bin"
    whole = path.read_bytes()
    for content in (b"", whole[:1], whole[:-1], whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_layout(fake10.cifar, fake10.binary, fake10.cifar.layouts[0])
        message = str(caught.value)
        assert str(path) in message
        assert f"expected {len(whole):,} bytes" in message
        assert f"found {len(content):,}" in message
        assert "--data-dir" in message
        assert "\n" not in message


def test_one_flipped_bit_of_a_pixel_is_noticed(fake10: Fake) -> None:
    path = fake10.binary / "test_batch.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"test_batch\.bin: not the official file \(expected sha256 .*, found"
    ):
        read_layout(fake10.cifar, fake10.binary, fake10.cifar.layouts[0])


@pytest.mark.parametrize("value", [10, 255])
def test_a_label_out_of_range_is_named(fake10: Fake, value: int) -> None:
    path = fake10.binary / "data_batch_1.bin"
    content = bytearray(path.read_bytes())
    content[3073 * 4] = value
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"expected labels from 0 to 9, found {value} at image 4"):
        read_layout(fake10.cifar, fake10.binary, fake10.cifar.layouts[0])


@pytest.mark.parametrize(("column", "limit"), [(0, 19), (1, 99)])
def test_both_labels_of_cifar100_are_checked(tmp_path: Path, column: int, limit: int) -> None:
    fake = make_fake(tmp_path, CIFAR100)
    path = fake.binary / "train.bin"
    content = bytearray(path.read_bytes())
    content[3074 * 7 + column] = limit + 1
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=f"expected labels from 0 to {limit}, found {limit + 1} at image 7"
    ):
        read_layout(fake.cifar, fake.binary, fake.cifar.layouts[0])


def test_an_altered_label_of_cifar100_is_noticed_by_counting(tmp_path: Path) -> None:
    fake = make_fake(tmp_path, CIFAR100)
    path = fake.binary / "train.bin"
    content = bytearray(path.read_bytes())
    content[1] = (content[1] + 1) % 100
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"train\.bin: not the official file \(expected 2 images of each class"
    ):
        read_layout(fake.cifar, fake.binary, fake.cifar.layouts[0])


def test_a_file_that_is_a_folder_or_is_gone_is_an_error_in_one_line(fake10: Fake) -> None:
    path = fake10.binary / "data_batch_2.bin"
    path.unlink()
    with pytest.raises(DataError, match=r"data_batch_2\.bin: cannot be read \(No such file"):
        read_layout(fake10.cifar, fake10.binary, fake10.cifar.layouts[0])
    path.mkdir()
    with pytest.raises(DataError, match=r"data_batch_2\.bin: cannot be read \(Is a directory"):
        read_layout(fake10.cifar, fake10.binary, fake10.cifar.layouts[0])


# The pickled layout.


def install_batch(fake: Fake, content: bytes, official: bool) -> tuple[Cifar, Layout]:
    """Put `content` in the place of the first batch; `official` also makes its size and digest the
    expected ones.
    """
    layout = fake.cifar.layouts[1]
    first = layout.train[0]
    (fake.pickled / first.name).write_bytes(content)
    known = digest_of(content, "md5") if official else digest_of(b"the real one", "md5")
    train = (BatchFile(first.name, first.images, len(content), known), *layout.train[1:])
    return fake.cifar, dataclasses.replace(layout, train=train)


class RunsCode:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch '{self.path}'",)


class CallsEval(RunsCode):
    def __reduce__(self) -> tuple[object, ...]:
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("hostile", [RunsCode, CallsEval])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_carries_code_is_refused_and_the_code_has_not_run(
    fake10: Fake, tmp_path: Path, hostile: type[RunsCode], protocol: int
) -> None:
    mark = tmp_path / "the code has run"
    batch = {b"data": hostile(mark), b"labels": [0] * 20}
    # The bomb is live: unpickled in the ordinary way it goes off.
    content = pickle.dumps(batch, protocol)
    pickle.loads(content)
    assert mark.exists()
    mark.unlink()

    for official in (True, False):
        cifar, layout = install_batch(fake10, content, official)
        with pytest.raises(DataError, match=r"asks for|not the official file"):
            read_layout(cifar, fake10.pickled, layout)
        assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "numpy\nload",
        "numpy.core.multiarray\nfromfile",
        "numpy\nndarray.tofile",
        "builtins\ngetattr",
        "builtins\neval",
        "os\nsystem",
        "functools\npartial",
        "_codecs\ndecode",
        "egtrain.data.pickles\n_admitted",
    ],
)
def test_no_other_name_is_looked_up(name: str) -> None:
    with pytest.raises(UnsafePickle, match="asks for"):
        load_plain_pickle(b"\x80\x02c" + name.encode() + b"\n.")


def test_a_dotted_name_does_not_reach_into_an_admitted_one() -> None:
    with pytest.raises(UnsafePickle, match="asks for"):
        load_plain_pickle(pickle.PROTO + b"\x04" + b"\x8c\x05numpy\x8c\x0dndarray.tobyt\x93.")


def test_pickles_written_by_python_3_with_byte_arrays_are_plain() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for protocol in (2, 3, 4):
        batch = load_plain_pickle(pickle.dumps({b"data": array, b"labels": [1, 2]}, protocol))
        assert isinstance(batch, dict)
        assert np.array_equal(batch[b"data"], array)
        assert batch[b"labels"] == [1, 2]
    by_columns = load_plain_pickle(pickle.dumps({b"data": np.asfortranarray(array)}, 2))
    assert isinstance(by_columns, dict)
    assert np.array_equal(by_columns[b"data"], array)


@pytest.mark.parametrize(
    "array", [np.zeros(3), np.array([None, "x"]), np.zeros(2, "u1,u1"), np.zeros(2, np.int8)]
)
def test_arrays_of_anything_but_bytes_are_refused(array: np.ndarray) -> None:
    with pytest.raises(UnsafePickle, match="other than bytes"):
        load_plain_pickle(pickle.dumps({b"data": array}, 2))


def test_an_array_that_lies_about_its_shape_is_refused_without_being_made() -> None:
    content = pickled_batch(np.zeros((4, 4), np.uint8), {"labels": [1]})
    content = content.replace(
        integer(4) + integer(4) + b"\x86", integer(2**31 - 1) + integer(2**31 - 1) + b"\x86"
    )
    with pytest.raises(UnsafePickle, match="comes with 16 bytes"):
        load_plain_pickle(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable pickle"),
        (b"\x80\x02}(", "not a readable pickle"),
        (b"\x80\x02(I1\nI2\n", "not a readable pickle"),
        (b"\x80\x02\x8c\xff", "not a readable pickle"),
        (b"\x80\x02Pname\n.", "outside the file"),
        (b"\x80\x02N.", "expected 'data'"),
        (b"\x80\x02}.", "expected 'data'"),
    ],
)
def test_a_damaged_pickle_is_one_sentence(fake10: Fake, content: bytes, message: str) -> None:
    cifar, layout = install_batch(fake10, content, official=True)
    with pytest.raises(DataError, match=message) as caught:
        read_layout(cifar, fake10.pickled, layout)
    assert "data_batch_1" in str(caught.value)
    assert "--data-dir" in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0] * 19, "found a list of 19"),
        ([0] * 19 + [10], "found 10 at image 19"),
        ([-1] + [0] * 19, "found -1 at image 0"),
        ([2**31 - 1] + [0] * 19, "found 10 at image 0"),
    ],
)
def test_wrong_labels_in_a_pickled_file_are_named(
    fake10: Fake, labels: list[int], message: str
) -> None:
    content = pickled_batch(fake10.rows[0], {"labels": labels})
    cifar, layout = install_batch(fake10, content, official=True)
    with pytest.raises(DataError, match=message):
        read_layout(cifar, fake10.pickled, layout)


def test_pixels_of_another_shape_in_a_pickled_file_are_named(fake10: Fake) -> None:
    content = pickled_batch(fake10.rows[0][:, :3000], {"labels": [0] * 20})
    cifar, layout = install_batch(fake10, content, official=True)
    with pytest.raises(
        DataError, match=r"expected 'data' to be uint8 \[20, 3072\], found uint8 \[20, 3000\]"
    ):
        read_layout(cifar, fake10.pickled, layout)


def test_an_altered_pickled_file_is_refused_before_it_is_unpickled(
    fake10: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "egtrain.data.cifar.load_plain_pickle", lambda content: pytest.fail("it was unpickled")
    )
    content = bytearray((fake10.pickled / "data_batch_1").read_bytes())
    content[-30] ^= 1
    (fake10.pickled / "data_batch_1").write_bytes(content)
    with pytest.raises(DataError, match="data_batch_1: not the official file"):
        read_layout(fake10.cifar, fake10.pickled, fake10.cifar.layouts[1])


# The real data.


@pytest.mark.data
def test_the_real_cifar10_has_the_published_statistics_and_survives_the_pickled_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = os.environ.get("EGTRAIN_DATA")
    folder = Path(home) / "cifar-10-batches-bin" if home else None
    if folder is None or not folder.is_dir():
        pytest.skip(
            "NOT TESTED ON REAL DATA: set EGTRAIN_DATA to the folder that holds "
            "cifar-10-batches-bin"
        )
    data = load_images(
        "cifar10", data_dir=folder, offline=True, seed=0, train_samples=None, validation=0
    )
    assert data.x_train.shape == (50_000, 32, 32, 3)
    assert data.x_test.shape == (10_000, 32, 32, 3)
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=1e-4)
    assert data.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=1e-4)
    assert data.y_train[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert torch.equal(data.y_train.bincount(), torch.full((10,), 5000))

    # One batch of it, written as NumPy under Python 2 wrote the official pickled file.
    record = np.frombuffer((folder / "test_batch.bin").read_bytes(), np.uint8).reshape(-1, 3073)
    content = pickled_batch(record[:, 1:], {"labels": record[:, 0].tolist()})
    batch = load_plain_pickle(content)
    assert isinstance(batch, dict)
    pixels = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(pixels, data.x_test.numpy())
