"""Downloads leave either the checked data or nothing behind."""

import errno
import gzip
import hashlib
import io
import os
import stat
import tarfile
import time
import urllib.error
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from egtrain.data import download
from egtrain.data.download import find_or_download
from egtrain.data.finding import Archive, DataSet, File, Found, Layout
from egtrain.data.sets import OF_TASK
from egtrain.errors import DataError, EgtrainError

FOLDER = "tiny-bin"
FILES = {"train.bin": b"training images", "test.bin": b"test images"}
LAYOUT = Layout(FOLDER, (File("train.bin"), File("test.bin")))

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
) -> DataSet:
    archive = Archive("tiny.tar.gz", hashlib.sha256(content).hexdigest(), len(content), addresses)
    return DataSet("Tiny", (LAYOUT,), (archive,))


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
    monkeypatch.setattr(download, "_open", lambda address: pytest.fail("the network was used"))
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def serve(
    monkeypatch: pytest.MonkeyPatch, **answers: bytes | BaseException | Callable[[int], bytes]
) -> Server:
    server = Server(**answers)
    monkeypatch.setattr(download, "_open", server)
    return server


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


COMPLETE = [FOLDER, f"{FOLDER}/test.bin", f"{FOLDER}/train.bin"]


# Downloads.


def test_a_good_archive_is_unpacked_and_nothing_else_is_left(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = archive_of(GOOD)
    server = serve(monkeypatch, one=content)
    data_set = described(content)
    found = find_or_download(data_set, home, offline=False)
    assert found == Found(data_set, home / FOLDER, LAYOUT)
    told = f"downloading tiny.tar.gz ({len(content)} bytes) from one.example to {home}\n"
    assert capsys.readouterr() == ("", told)
    assert everything_in(home) == COMPLETE
    assert {name: (home / FOLDER / name).read_bytes() for name in FILES} == FILES
    # The second time it is there.
    find_or_download(described(content), home, offline=False)
    assert server.asked == ["one"]


def test_a_folder_that_does_not_exist_is_made(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive_of(GOOD)
    serve(monkeypatch, one=content)
    target = home / "new" / "folder"
    find_or_download(described(content), target, offline=False)
    assert everything_in(target) == COMPLETE


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (archive_of(GOOD)[:-1] + b"\xff", "it sent sha256"),
        (archive_of(GOOD)[:50], "it sent 50 of"),
        (b"", "it sent 0 of"),
        (archive_of(GOOD) + b"\0", "it sends more than"),
        (urllib.error.HTTPError("", 404, "", None, None), "HTTP Error 404"),  # type: ignore[arg-type]
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
    find_or_download(described(content), home, offline=False)
    assert server.asked == ["one", "two"]
    assert everything_in(home) == COMPLETE

    other = home.parent / "other"
    serve(monkeypatch, one=bad, two=bad)
    monkeypatch.setattr(download, "data_folders", lambda data_dir: [other])
    with pytest.raises(
        DataError, match=f"could not be downloaded .*one.example: {reason}.*two.example: {reason}"
    ) as caught:
        find_or_download(described(content), other, offline=False)
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
        find_or_download(described(content), home, offline=False)
    assert everything_in(home) == []


def test_ctrl_c_leaves_no_partial_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive_of(GOOD)

    def interrupted(size: int) -> bytes:
        assert any(path.endswith("tiny.tar.gz") for path in everything_in(home))
        raise KeyboardInterrupt

    serve(monkeypatch, one=interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_or_download(described(content), home, offline=False)
    assert everything_in(home) == []


def test_what_a_killed_download_left_is_cleared_away(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive_of(GOOD)
    (home / ".egtrain-download-abc").mkdir()
    (home / ".egtrain-download-abc" / "tiny.tar.gz").write_bytes(b"half")
    serve(monkeypatch, one=content)
    find_or_download(described(content), home, offline=False)
    assert everything_in(home) == COMPLETE


def test_a_very_slow_server_is_given_up_but_not_the_last(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive_of(GOOD)
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(download.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(download, "CHUNK", 64)
    server = serve(monkeypatch, one=content, two=content)
    find_or_download(described(content), home, offline=False)
    assert server.asked == ["one", "two"]
    assert everything_in(home) == COMPLETE


def test_of_two_at_once_one_downloads_and_the_other_waits(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive_of(GOOD)
    data_set = described(content)
    slow = io.BytesIO(content)

    def read(size: int) -> bytes:
        time.sleep(0.1)
        return slow.read(size)

    server = serve(monkeypatch, one=read)
    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(find_or_download, data_set, home, False) for _ in range(2)]
        assert [result.result(timeout=20) for result in results] == [
            Found(data_set, home / FOLDER, LAYOUT)
        ] * 2
    assert server.asked == ["one"]


def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive_of(GOOD)
    serve(monkeypatch, one=content)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(
        EgtrainError, match=rf"{home}: the disk is full \([0-9,]+ bytes are free\); .* --data-dir"
    ) as caught:
        find_or_download(described(content), home, offline=False)
    assert caught.value.exit_code == 1
    assert everything_in(home) == []


def test_a_place_that_cannot_be_written_is_named(home: Path) -> None:
    (home / "file").touch()
    with pytest.raises(DataError, match=f"{home / 'file'}: cannot be (read|written) .* --data-dir"):
        find_or_download(described(b""), home / "file", offline=False)


def test_other_files_in_the_way_are_not_touched(home: Path) -> None:
    (home / FOLDER).mkdir()
    (home / FOLDER / "notes.txt").touch()
    with pytest.raises(DataError, match="in the way of the download"):
        find_or_download(described(archive_of(GOOD)), home, offline=False)
    assert everything_in(home) == [FOLDER, f"{FOLDER}/notes.txt"]


# Archives that hold more than they should, with the right hash.


HOSTILE = [
    member("../outside", b"x"),
    member(f"{FOLDER}/../../outside", b"x"),
    member("../train.bin", b"x"),
    member("/tmp/outside", b"x"),
    member(f"{FOLDER}/link", kind=tarfile.SYMTYPE, link="/etc/passwd"),
    member(f"{FOLDER}/train.bin", kind=tarfile.SYMTYPE, link="/etc/passwd"),
    member(f"{FOLDER}/train.bin", kind=tarfile.LNKTYPE, link=f"{FOLDER}/test.bin"),
    member(FOLDER, kind=tarfile.SYMTYPE, link="/tmp"),
    member(f"{FOLDER}/device", kind=tarfile.CHRTYPE),
    member(f"{FOLDER}/train.bin", kind=tarfile.FIFOTYPE),
]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("extra", HOSTILE, ids=lambda value: value[0].name)
def test_whatever_an_archive_holds_only_the_files_of_the_data_set_are_written(
    home: Path, monkeypatch: pytest.MonkeyPatch, extra: Member, first: bool
) -> None:
    content = archive_of([extra, *GOOD] if first else [*GOOD, extra])
    serve(monkeypatch, one=content)
    find_or_download(described(content), home, offline=False)
    assert everything_in(home.parent) == ["data", *(f"data/{path}" for path in COMPLETE)]
    assert not any(path.is_symlink() for path in home.rglob("*"))
    assert {name: (home / FOLDER / name).read_bytes() for name in FILES} == FILES
    assert not Path("/tmp/outside").exists()


# The network.


def test_a_server_that_does_not_answer_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def opened(request: object, timeout: float) -> io.BytesIO:
        seen.append(timeout)
        return io.BytesIO()

    monkeypatch.setattr(download.urllib.request, "urlopen", opened)
    download._open("https://one.example/a")
    assert seen == [download.TIMEOUT]


@pytest.mark.parametrize(
    ("name", "official", "mirrors"),
    [
        ("cifar10", "https://www.cs.toronto.edu/~kriz/", 3),
        ("cifar100", "https://www.cs.toronto.edu/~kriz/", 3),
        ("wikitext2", "https://s3.amazonaws.com/research.metamind.io/wikitext/", 2),
        (
            "multi30k",
            "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/",
            2,
        ),
    ],
)
def test_every_archive_has_the_official_address_first_then_mirrors_and_a_hash(
    name: str, official: str, mirrors: int
) -> None:
    (data_set,) = (sets[name] for sets in OF_TASK.values() if name in sets)
    assert data_set.archives
    for archive in data_set.archives:
        assert archive.addresses[0] == official + archive.name
        assert len(archive.addresses) >= mirrors
        assert all(a.startswith("https://") and a.endswith(archive.name) for a in archive.addresses)
        assert len(archive.sha256) == 64


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_in_the_layout_that_needs_no_unpickling(name: str) -> None:
    layout = OF_TASK["image"][name].layouts[0]
    assert all(file.name.endswith(".bin") for file in layout.files)


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


def set_of(*archives: Archive) -> DataSet:
    return DataSet("Tiny", (LAYOUT,), archives)


def test_a_zip_is_unpacked_like_a_tar(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = zip_of(
        {f"{FOLDER}/": b"", f"{FOLDER}/read.me": b"?"}
        | {f"{FOLDER}/{n}": c for n, c in FILES.items()}
    )
    serve(monkeypatch, one=content)
    find_or_download(set_of(part("tiny.zip", content)), home, offline=False)
    assert everything_in(home) == COMPLETE
    assert {name: (home / FOLDER / name).read_bytes() for name in FILES} == FILES


def test_parts_that_are_packed_one_by_one_are_put_together(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = {name: gzip.compress(content) for name, content in FILES.items()}
    parts = [part(f"{name}.gz", content) for name, content in packed.items()]
    answers = {f"https://one.example/{name}.gz": content for name, content in packed.items()}
    monkeypatch.setattr(download, "_open", lambda address: io.BytesIO(answers[address]))
    find_or_download(set_of(*parts), home, offline=False)
    assert everything_in(home) == COMPLETE
    assert {name: (home / FOLDER / name).read_bytes() for name in FILES} == FILES


def test_a_part_that_cannot_be_had_leaves_nothing_of_the_others(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, altered = gzip.compress(FILES["train.bin"]), gzip.compress(b"altered images")
    answers = {"https://one.example/train.bin.gz": good, "https://one.example/test.bin.gz": altered}
    monkeypatch.setattr(download, "_open", lambda address: io.BytesIO(answers[address]))
    expected = part("test.bin.gz", gzip.compress(FILES["test.bin"]))
    with pytest.raises(DataError, match=r"could not be downloaded .*one\.example: it sen"):
        find_or_download(set_of(part("train.bin.gz", good), expected), home, offline=False)
    assert everything_in(home) == []


# Folders that cannot be synced.


def not_syncing_folders(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_a_folder_holds_the_data_as_well(
    home: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    content = archive_of(GOOD)
    serve(monkeypatch, one=content)
    not_syncing_folders(monkeypatch, number)
    find_or_download(described(content), home, offline=False)
    assert everything_in(home) == COMPLETE


def test_a_folder_that_fails_to_sync_for_another_reason_is_an_error(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive_of(GOOD)
    serve(monkeypatch, one=content)
    not_syncing_folders(monkeypatch, errno.EIO)
    with pytest.raises(DataError, match=r"cannot be written \(Input/output error\)"):
        find_or_download(described(content), home, offline=False)
