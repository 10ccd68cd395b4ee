"""The search order, and downloads that leave either the checked data or nothing behind."""

import dataclasses
import gzip
import hashlib
import io
import re
import tarfile
import time
import urllib.error
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from egtrain.data import fetch
from egtrain.data.cifar import CIFAR10, CIFAR100, BatchFile, Cifar, Layout
from egtrain.data.fetch import Archive
from egtrain.data.images import load_images
from egtrain.data.pairs import MULTI30K, Multi30k
from egtrain.data.text import WIKITEXT2, WikiText
from egtrain.errors import DataError, EgtrainError

FOLDER = "tiny-bin"
FILES = {"train.bin": b"training images", "test.bin": b"test images"}
LAYOUT = Layout(
    FOLDER,
    pickled=False,
    train=(BatchFile("train.bin", 1, len(FILES["train.bin"]), None),),
    test=(BatchFile("test.bin", 1, len(FILES["test.bin"]), None),),
)

Member = tuple[tarfile.TarInfo, bytes]


def member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    return info, content


GOOD: list[Member] = [
    member(FOLDER, kind=tarfile.DIRTYPE),
    member(f"{FOLDER}/readme.html", b"<html>"),
    *(member(f"{FOLDER}/{name}", content) for name, content in FILES.items()),
]


def archive_of(members: list[Member]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def described(
    content: bytes, addresses: tuple[str, ...] = ("https://one.example/a", "https://two.example/a")
) -> Cifar:
    archive = Archive("tiny.tar.gz", hashlib.sha256(content).hexdigest(), len(content), addresses)
    return dataclasses.replace(CIFAR10, title="Tiny", layouts=(LAYOUT,), archives=(archive,))


class Server:
    """Answers each address with bytes, an exception, or something to call for each read."""

    def __init__(self, **answers: bytes | BaseException | Callable[[int], bytes]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def __call__(self, address: str) -> io.BufferedIOBase:
        host = address.split("/")[2].split(".")[0]
        self.asked.append(host)
        answer = self.answers[host]
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, bytes):
            return io.BytesIO(answer)
        stream = io.BytesIO()
        stream.read = answer  # type: ignore[method-assign,assignment]
        return stream


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for downloads; no other place has data, and no test reaches the network."""
    monkeypatch.delenv("EGTRAIN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_open", lambda address: pytest.fail("the network was used"))
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def serve(
    monkeypatch: pytest.MonkeyPatch, **answers: bytes | BaseException | Callable[[int], bytes]
) -> Server:
    server = Server(**answers)
    monkeypatch.setattr(fetch, "_open", server)
    return server


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


COMPLETE = [FOLDER, f"{FOLDER}/test.bin", f"{FOLDER}/train.bin"]


def put_data(folder: Path, *names: str) -> Path:
    (folder / FOLDER).mkdir(parents=True)
    for name in names or FILES:
        (folder / FOLDER / name).write_bytes(FILES[name])
    return folder / FOLDER


# Where data are looked for.


def test_the_places_are_tried_in_the_documented_order(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar = described(b"")
    cached = put_data(tmp_path / "cache" / "egtrain")
    assert fetch.find(cifar, home) == (cached, LAYOUT)
    monkeypatch.setenv("EGTRAIN_DATA", str(tmp_path / "shared"))
    shared = put_data(tmp_path / "shared")
    assert fetch.find(cifar, home) == (shared, LAYOUT)
    own = put_data(home)
    assert fetch.find(cifar, home) == (own, LAYOUT)
    assert fetch.find(cifar, own) == (own, LAYOUT)
    assert fetch.find(cifar, None) == (shared, LAYOUT)


def test_an_incomplete_folder_is_an_error_that_names_what_is_missing(home: Path) -> None:
    folder = put_data(home, "train.bin")
    for data_dir in (home, folder):
        with pytest.raises(
            DataError,
            match=rf"{folder}: Tiny is incomplete, test\.bin missing; .* delete the folder",
        ):
            fetch.find_or_download(described(b""), data_dir, offline=False)


def test_a_complete_folder_elsewhere_is_taken_before_an_incomplete_one(
    home: Path, tmp_path: Path
) -> None:
    put_data(home, "train.bin")
    cached = put_data(tmp_path / "cache" / "egtrain")
    assert fetch.find(described(b""), home) == (cached, LAYOUT)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_offline_names_every_place_and_both_ways_out(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("EGTRAIN_DATA", str(tmp_path / "shared"))
    with pytest.raises(DataError) as caught:
        load_images(name, data_dir=home, offline=True, seed=0, train_samples=None, validation=0)
    message = str(caught.value)
    for part in (
        home,
        tmp_path / "shared",
        tmp_path / "cache" / "egtrain",
        "--data-dir",
        "--data synthetic",
        "--offline",
    ):
        assert str(part) in message
    assert caught.value.exit_code == 3
    assert "\n" not in message
    assert everything_in(tmp_path) == ["data"]


# Downloads.


def test_a_good_archive_is_unpacked_and_nothing_else_is_left(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive_of(GOOD)
    server = serve(monkeypatch, one=content)
    assert fetch.find_or_download(described(content), home, offline=False) == (
        home / FOLDER,
        LAYOUT,
    )
    assert everything_in(home) == COMPLETE
    assert {name: (home / FOLDER / name).read_bytes() for name in FILES} == FILES
    # The second time it is there.
    fetch.find_or_download(described(content), home, offline=False)
    assert server.asked == ["one"]


def test_a_folder_that_does_not_exist_is_made(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive_of(GOOD)
    serve(monkeypatch, one=content)
    target = home / "new" / "folder"
    fetch.find_or_download(described(content), target, offline=False)
    assert everything_in(target) == COMPLETE


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (archive_of(GOOD)[:-1] + b"\xff", "it sent sha256"),
        (archive_of(GOOD)[:50], "it sent 50 of"),
        (b"", "it sent 0 of"),
        (archive_of(GOOD) + b"\0", "it sends more than"),
        (urllib.error.HTTPError("", 404, "", None, None), "HTTP status 404"),  # type: ignore[arg-type]
        (urllib.error.URLError(OSError("no route")), "no route"),
        (TimeoutError("timed out"), "timed out"),
        (ConnectionResetError("reset by peer"), "reset by peer"),
    ],
)
def test_a_server_that_fails_is_followed_by_the_next_and_its_bytes_are_removed(
    home: Path, monkeypatch: pytest.MonkeyPatch, bad: bytes | BaseException, reason: str
) -> None:
    content = archive_of(GOOD)
    server = serve(monkeypatch, one=bad, two=content)
    fetch.find_or_download(described(content), home, offline=False)
    assert server.asked == ["one", "two"]
    assert everything_in(home) == COMPLETE

    other = home.parent / "other"
    serve(monkeypatch, one=bad, two=bad)
    monkeypatch.setattr(fetch, "data_folders", lambda data_dir: [other])
    with pytest.raises(
        DataError, match=f"could not be downloaded .*one.example: {reason}.*two.example: {reason}"
    ) as caught:
        fetch.find_or_download(described(content), other, offline=False)
    assert everything_in(other) == []
    assert str(other) in str(caught.value)
    assert "--data synthetic" in str(caught.value)


def test_a_connection_that_breaks_in_the_middle_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive_of(GOOD)

    def breaks(size: int, state: list[int] = []) -> bytes:  # noqa: B006
        state.append(size)
        if len(state) > 1:
            raise OSError("the network is unreachable")
        return content[:100]

    serve(monkeypatch, one=breaks, two=TimeoutError("timed out"))
    with pytest.raises(DataError, match=r"the network is unreachable; two\.example: timed out"):
        fetch.find_or_download(described(content), home, offline=False)
    assert everything_in(home) == []


def test_ctrl_c_leaves_no_partial_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive_of(GOOD)

    def interrupted(size: int) -> bytes:
        assert any(path.endswith("tiny.tar.gz") for path in everything_in(home))
        raise KeyboardInterrupt

    serve(monkeypatch, one=interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.find_or_download(described(content), home, offline=False)
    assert everything_in(home) == []


def test_what_a_killed_download_left_is_cleared_away(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive_of(GOOD)
    (home / ".egtrain-download-abc").mkdir()
    (home / ".egtrain-download-abc" / "tiny.tar.gz").write_bytes(b"half")
    serve(monkeypatch, one=content)
    fetch.find_or_download(described(content), home, offline=False)
    assert everything_in(home) == COMPLETE


def test_a_very_slow_server_is_given_up_but_not_the_last(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive_of(GOOD)
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(fetch.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(fetch, "CHUNK", 64)
    server = serve(monkeypatch, one=content, two=content)
    fetch.find_or_download(described(content), home, offline=False)
    assert server.asked == ["one", "two"]
    assert everything_in(home) == COMPLETE


def test_of_two_at_once_one_downloads_and_the_other_waits(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive_of(GOOD)
    cifar = described(content)
    slow = io.BytesIO(content)

    def read(size: int) -> bytes:
        time.sleep(0.1)
        return slow.read(size)

    server = serve(monkeypatch, one=read)
    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(fetch.find_or_download, cifar, home, False) for _ in range(2)]
        assert [result.result(timeout=20) for result in results] == [(home / FOLDER, LAYOUT)] * 2
    assert server.asked == ["one"]


def test_a_disk_without_room_is_named_with_its_free_bytes(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        fetch.shutil, "disk_usage", lambda path: fetch.shutil._ntuple_diskusage(100, 97, 3)
    )
    with pytest.raises(
        EgtrainError, match=f"{home}: the disk is full, 3 bytes are free and .* needed"
    ) as caught:
        fetch.find_or_download(described(archive_of(GOOD)), home, offline=False)
    assert caught.value.exit_code == 1
    assert everything_in(home) == []


def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive_of(GOOD)
    serve(monkeypatch, one=content)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch.os, "fsync", full)
    with pytest.raises(EgtrainError, match="the disk is full"):
        fetch.find_or_download(described(content), home, offline=False)
    assert everything_in(home) == []


def test_a_place_that_cannot_be_written_is_named(home: Path) -> None:
    (home / "file").touch()
    with pytest.raises(DataError, match=f"{home / 'file'}: cannot be (read|written) .* --data-dir"):
        fetch.find_or_download(described(b""), home / "file", offline=False)


def test_other_files_in_the_way_are_not_touched(home: Path) -> None:
    (home / FOLDER).mkdir()
    (home / FOLDER / "notes.txt").touch()
    with pytest.raises(DataError, match="in the way of the download"):
        fetch.find_or_download(described(archive_of(GOOD)), home, offline=False)
    assert everything_in(home) == [FOLDER, f"{FOLDER}/notes.txt"]


# Hostile archives, whose hash is right.


HOSTILE = [
    ([member("../outside", b"x")], "outside its folder"),
    ([member(f"{FOLDER}/../../outside", b"x")], "outside its folder"),
    ([member("/tmp/outside", b"x")], "outside its folder"),
    ([member(f"{FOLDER}/link", kind=tarfile.SYMTYPE, link="/etc/passwd")], "no plain file"),
    ([member(f"{FOLDER}/train.bin", kind=tarfile.SYMTYPE, link="/etc/passwd")], "no plain file"),
    (
        [member(f"{FOLDER}/train.bin", kind=tarfile.LNKTYPE, link=f"{FOLDER}/test.bin")],
        "no plain file",
    ),
    ([member(FOLDER, kind=tarfile.SYMTYPE, link="/tmp")], "no plain file"),
    ([member(f"{FOLDER}/device", kind=tarfile.CHRTYPE)], "no plain file"),
    ([member(f"{FOLDER}/device", kind=tarfile.BLKTYPE)], "no plain file"),
    ([member(f"{FOLDER}/pipe", kind=tarfile.FIFOTYPE)], "no plain file"),
    ([member(f"{FOLDER}/train.bin", FILES["train.bin"])], "twice"),
    ([member(f"{FOLDER}/bomb", bytes(2**20 + 1))], "unexpected 1,048,577 bytes"),
    ([member(f"{FOLDER}/{number}", b"") for number in range(200)], "too many files"),
]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("extra", "reason"), HOSTILE)
def test_a_hostile_archive_is_refused_whole_and_removed(
    home: Path, monkeypatch: pytest.MonkeyPatch, extra: list[Member], reason: str, first: bool
) -> None:
    content = archive_of(extra + GOOD if first else GOOD + extra)
    serve(monkeypatch, one=content, two=content)
    before = everything_in(home.parent)
    with pytest.raises(DataError, match=reason):
        fetch.find_or_download(described(content), home, offline=False)
    assert everything_in(home.parent) == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (archive_of(GOOD[:-1]), r"its archive lacks tiny-bin/test\.bin"),
        (
            archive_of([*GOOD[:-1], member(f"{FOLDER}/test.bin", b"short")]),
            "with an unexpected 5 bytes",
        ),
        (archive_of(GOOD)[:-20], "cannot be read"),
        (b"\x1f\x8b" + bytes(100), "cannot be read"),
        (b"<html>Moved</html>", "cannot be read"),
    ],
)
def test_an_archive_that_is_not_what_it_should_be_is_removed(
    home: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, reason: str
) -> None:
    serve(monkeypatch, one=content, two=content)
    with pytest.raises(DataError, match=reason):
        fetch.find_or_download(described(content), home, offline=False)
    assert everything_in(home) == []


# The network.


def test_only_https_is_opened_and_followed() -> None:
    with pytest.raises(fetch._Refused, match="not https"):
        fetch._open("http://one.example/a")
    with pytest.raises(fetch._Refused, match="not https"):
        fetch._open("file:///etc/passwd")
    request = fetch.urllib.request.Request("https://one.example/a")
    handler = fetch._OnlyHttps()
    for address in ("http://one.example/b", "file:///etc/passwd", "ftp://one.example/b"):
        with pytest.raises(fetch._Refused, match="not https"):
            handler.redirect_request(request, None, 302, "", {}, address)
    followed = handler.redirect_request(request, None, 302, "", {}, "https://two.example/b")
    assert followed is not None
    assert followed.full_url == "https://two.example/b"


def test_a_server_that_does_not_answer_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Opener:
        def open(self, request: object, timeout: float) -> io.BytesIO:
            seen.append(timeout)
            return io.BytesIO()

    monkeypatch.setattr(fetch.urllib.request, "build_opener", lambda *handlers: Opener())
    fetch._open("https://one.example/a")
    assert seen == [fetch.TIMEOUT]


@pytest.mark.parametrize(
    ("data_set", "official", "mirrors"),
    [
        (CIFAR10, "https://www.cs.toronto.edu/~kriz/", 3),
        (CIFAR100, "https://www.cs.toronto.edu/~kriz/", 3),
        (WIKITEXT2, "https://s3.amazonaws.com/research.metamind.io/wikitext/", 2),
        (MULTI30K, "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/", 2),
    ],
    ids=lambda value: getattr(value, "title", ""),
)
def test_every_archive_has_the_official_address_first_then_mirrors_and_a_hash(
    data_set: Cifar | WikiText | Multi30k, official: str, mirrors: int
) -> None:
    assert data_set.archives
    for archive in data_set.archives:
        assert archive.addresses[0] == official + archive.name
        assert len(archive.addresses) >= mirrors
        assert all(a.startswith("https://") and a.endswith(archive.name) for a in archive.addresses)
        assert len(archive.sha256) == 64


def test_cifar_is_downloaded_in_the_layout_that_needs_no_unpickling() -> None:
    assert not CIFAR10.layouts[0].pickled
    assert not CIFAR100.layouts[0].pickled


# Sets that come as a .zip, or in several parts.


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def part(name: str, content: bytes) -> Archive:
    return Archive(
        name, hashlib.sha256(content).hexdigest(), len(content), (f"https://one.example/{name}",)
    )


def set_of(*archives: Archive) -> Cifar:
    return dataclasses.replace(CIFAR10, title="Tiny", layouts=(LAYOUT,), archives=archives)


def test_a_zip_is_unpacked_like_a_tar(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = zip_of(
        {f"{FOLDER}/": b"", f"{FOLDER}/read.me": b"?"}
        | {f"{FOLDER}/{n}": c for n, c in FILES.items()}
    )
    serve(monkeypatch, one=content)
    assert fetch.find_or_download(set_of(part("tiny.zip", content)), home, offline=False) == (
        home / FOLDER,
        LAYOUT,
    )
    assert everything_in(home) == COMPLETE
    assert {name: (home / FOLDER / name).read_bytes() for name in FILES} == FILES


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../train.bin": b""}, "a path outside its folder"),
        ({f"{FOLDER}/train.bin": b"training images"}, "lacks tiny-bin/test.bin"),
        ({f"{FOLDER}/train.bin": b"training image"}, "with an unexpected 14 bytes"),
    ],
)
def test_a_zip_that_is_not_what_it_claims_to_be_is_refused(
    members: dict[str, bytes], message: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = zip_of(members)
    serve(monkeypatch, one=content)
    with pytest.raises(DataError, match=re.escape(message)):
        fetch.find_or_download(set_of(part("tiny.zip", content)), home, offline=False)
    assert everything_in(home) == []


def test_parts_that_are_packed_one_by_one_are_put_together(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = {name: gzip.compress(content) for name, content in FILES.items()}
    parts = [part(f"{name}.gz", content) for name, content in packed.items()]
    answers = {f"https://one.example/{name}.gz": content for name, content in packed.items()}
    monkeypatch.setattr(fetch, "_open", lambda address: io.BytesIO(answers[address]))
    fetch.find_or_download(set_of(*parts), home, offline=False)
    assert everything_in(home) == COMPLETE
    assert {name: (home / FOLDER / name).read_bytes() for name in FILES} == FILES


def test_a_part_that_cannot_be_had_leaves_nothing_of_the_others(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, larger = gzip.compress(FILES["train.bin"]), gzip.compress(b"more than is expected")
    answers = {"https://one.example/train.bin.gz": good, "https://one.example/test.bin.gz": larger}
    monkeypatch.setattr(fetch, "_open", lambda address: io.BytesIO(answers[address]))
    with pytest.raises(DataError, match="with an unexpected 12 bytes"):
        fetch.find_or_download(
            set_of(part("train.bin.gz", good), part("test.bin.gz", larger)), home, offline=False
        )
    assert everything_in(home) == []
