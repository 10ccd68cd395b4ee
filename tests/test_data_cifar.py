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

from egtrain.data.cifar import CIFAR10, CIFAR100
from egtrain.data.finding import File, Found, ImageSet, Layout
from egtrain.data.images import ImageData, load_images
from egtrain.data.pickles import load_plain_pickle
from egtrain.data.sets import IMAGES
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

    data_set: ImageSet
    binary: Path
    pickled: Path
    rows: list[np.ndarray]
    labels: list[np.ndarray]

    def read(self, layout: int = 0) -> None:
        """Read the distribution, the binary one or the pickled one, from where it lies."""
        folder = (self.binary, self.pickled)[layout]
        self.data_set.read(Found(self.data_set, folder, self.data_set.layouts[layout]))


def make_fake(folder: Path, real: ImageSet) -> Fake:
    """Write both distributions with `PER_CLASS` images of each class in each file."""
    generator = np.random.default_rng(0)
    files, classes = len(real.layouts[0].files), 10 if real is CIFAR10 else 100
    count = PER_CLASS * classes
    rows = [generator.integers(0, 256, (count, 3072), np.uint8) for _ in range(files)]
    labels = [
        generator.permutation(np.arange(count) % classes).astype(np.uint8) for _ in range(files)
    ]
    layouts = []
    for layout in real.layouts:
        (folder / layout.folder).mkdir()
        written = []
        for file, pixels, numbers in zip(layout.files, rows, labels, strict=True):
            if not file.name.endswith(".bin"):
                keys = (
                    {"labels": numbers.tolist()}
                    if classes == 10
                    else {
                        "fine_labels": numbers.tolist(),
                        "coarse_labels": (numbers // 5).tolist(),
                    }
                )
                content = pickled_batch(pixels, keys)
            else:
                columns = [numbers[:, None]] if classes == 10 else [numbers[:, None] // 5]
                columns += [numbers[:, None]] if classes == 100 else []
                content = np.concatenate([*columns, pixels], axis=1).tobytes()
            (folder / layout.folder / file.name).write_bytes(content)
            known = {None: "", 32: "md5", 64: "sha256"}[file.digest and len(file.digest)]
            written.append(File(file.name, digest_of(content, known) if known else None))
        layouts.append(Layout(layout.folder, tuple(written)))
    fake = dataclasses.replace(real, layouts=tuple(layouts))
    return Fake(fake, folder / layouts[0].folder, folder / layouts[1].folder, rows, labels)


@pytest.fixture(params=[CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def fake(request: pytest.FixtureRequest, tmp_path: Path) -> Fake:
    return make_fake(tmp_path, request.param)


@pytest.fixture
def fake10(tmp_path: Path) -> Fake:
    return make_fake(tmp_path, CIFAR10)


def load_fake(fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ImageData:
    monkeypatch.setitem(IMAGES, "cifar10", fake.data_set)
    return load_images("cifar10", data_dir=folder, offline=True, train_samples=None, validation=0)


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


@pytest.mark.parametrize("change", ["truncated", "empty", "longer", "a pixel", "a label"])
@pytest.mark.parametrize(
    ("layout", "name", "algorithm"),
    [(0, "data_batch_3.bin", "sha256"), (1, "data_batch_3", "md5")],
    ids=["binary", "pickled"],
)
def test_a_file_that_is_not_the_official_one_is_named_with_the_fix(
    fake10: Fake, layout: int, name: str, algorithm: str, change: str
) -> None:
    path = (fake10.binary, fake10.pickled)[layout] / name
    whole = path.read_bytes()
    content = {
        "truncated": whole[:-1],
        "empty": b"",
        "longer": whole + b"\0",
        "a pixel": whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:],
        "a label": bytes([whole[0] ^ 1]) + whole[1:],
    }[change]
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        fake10.read(layout)
    message = str(caught.value)
    assert message.startswith(f"{path}: not the official file of CIFAR-10 ({len(content):,} bytes")
    assert f"with {algorithm} {digest_of(content, algorithm)}, not " in message
    assert "--data-dir" in message
    assert "\n" not in message


def test_a_binary_file_of_cifar100_that_is_truncated_or_has_other_labels_is_noticed(
    tmp_path: Path,
) -> None:
    fake = make_fake(tmp_path, CIFAR100)
    path = fake.binary / "train.bin"
    whole = path.read_bytes()
    for label in (1, 100, 255):
        path.write_bytes(whole[:1] + bytes([(whole[1] + label) % 256]) + whole[2:])
        with pytest.raises(DataError, match=r"train\.bin: not the official .* 100 classes"):
            fake.read()
    for content, found in (
        (whole[:-1], "not a whole number of images"),
        (whole[3074:], "100 classes"),
        (b"", "not a whole number of images"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"train\.bin: not the official .*{found}"):
            fake.read()


def test_a_file_that_is_a_folder_or_is_gone_is_an_error_in_one_line(fake10: Fake) -> None:
    path = fake10.binary / "data_batch_2.bin"
    path.unlink()
    with pytest.raises(DataError, match=r"data_batch_2\.bin: cannot be read \(No such file"):
        fake10.read()
    path.mkdir()
    with pytest.raises(DataError, match=r"data_batch_2\.bin: cannot be read \(Is a directory"):
        fake10.read()


# The pickled layout.


def install_batch(fake: Fake, content: bytes, official: bool) -> Fake:
    """Put `content` in the place of the first batch; `official` also makes its digest the expected
    one.
    """
    binary, pickled = fake.data_set.layouts
    first = pickled.files[0].name
    (fake.pickled / first).write_bytes(content)
    known = File(first, digest_of(content if official else b"the real one", "md5"))
    layout = Layout(pickled.folder, (known, *pickled.files[1:]))
    data_set = dataclasses.replace(fake.data_set, layouts=(binary, layout))
    return dataclasses.replace(fake, data_set=data_set)


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
        fake = install_batch(fake10, content, official)
        with pytest.raises(DataError, match=r"asks for|not the official file"):
            fake.read(1)
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
        "_codecs\nencode",
        "egtrain.data.pickles\n_ADMITTED",
    ],
)
def test_no_other_name_is_looked_up(name: str) -> None:
    with pytest.raises(DataError, match="asks for"):
        load_plain_pickle(b"\x80\x02c" + name.encode() + b"\n.")


def test_a_dotted_name_does_not_reach_into_an_admitted_one() -> None:
    with pytest.raises(DataError, match="asks for"):
        load_plain_pickle(pickle.PROTO + b"\x04" + b"\x8c\x05numpy\x8c\x0dndarray.tobyt\x93.")


def test_an_altered_pickled_file_is_refused_before_it_is_unpickled(
    fake10: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "egtrain.data.pickles.load_plain_pickle", lambda content: pytest.fail("it was unpickled")
    )
    content = bytearray((fake10.pickled / "data_batch_1").read_bytes())
    content[-30] ^= 1
    (fake10.pickled / "data_batch_1").write_bytes(content)
    with pytest.raises(DataError, match="data_batch_1: not the official file"):
        fake10.read(1)


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
    data = load_images("cifar10", data_dir=folder, offline=True, train_samples=None, validation=0)
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
    pixels = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(pixels, data.x_test.numpy())
