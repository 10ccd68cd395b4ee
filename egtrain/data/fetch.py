"""Where a data set lies on disk, and the checked download of what is not there."""

import contextlib
import errno
import fcntl
import functools
import gzip
import hashlib
import http.client
import io
import os
import shutil
import ssl
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from egtrain.errors import DataError, EgtrainError, NotDownloaded

TIMEOUT = 20.0
"""Seconds without a byte after which a server is given up."""
PATIENCE = 30.0
"""Seconds after which a server that has been slower than `SLOWEST` is given up for the next one."""
SLOWEST = 100_000
"""Bytes per second."""
CHUNK = 1 << 18
LARGEST_EXTRA = 1 << 20
"""Bytes of a file in an archive beside the wanted ones (read-me, class names)."""
LARGEST_ARCHIVE = 100
"""Files in an archive."""
_TEMPORARY = ".egtrain-download-"


class File(Protocol):
    """A file of a data set."""

    @property
    def name(self) -> str:
        """How it is called on disk."""

    @property
    def size(self) -> int:
        """Bytes."""


class Layout(Protocol):
    """One way in which a data set lies on disk."""

    @property
    def folder(self) -> str:
        """Name of the folder that holds it."""

    @property
    def files(self) -> Sequence[File]:
        """All files that it needs."""


AnyLayout = TypeVar("AnyLayout", bound=Layout, covariant=True)


@dataclass(frozen=True)
class Archive:
    """A part of a data set to download: a .tar.gz or .zip with files of the first layout, or one of
    them as .gz.
    """

    name: str
    sha256: str
    size: int
    """Bytes."""
    addresses: tuple[str, ...]
    """Mirrors, tried in this order."""


class DataSet(Protocol[AnyLayout]):
    """What there is to find or to download."""

    @property
    def title(self) -> str:
        """Its name in messages."""

    @property
    def layouts(self) -> Sequence[AnyLayout]:
        """How it may lie on disk; the first is what the archives hold."""

    @property
    def archives(self) -> Sequence[Archive]:
        """All that is to be downloaded."""


def bytes_needed(data_set: DataSet[Layout]) -> int:
    """Return the space that a download takes while it is unpacked."""
    return sum(archive.size for archive in data_set.archives) + sum(
        file.size for file in data_set.layouts[0].files
    )


def locate(data_set: DataSet[Layout], data_dir: Path | None, offline: bool) -> str:
    """Say in a few words where `find_or_download` would take the data from; downloads nothing.

    Raises `DataError` where a data set on disk lacks files.
    """
    if found := find(data_set, data_dir):
        return f"found: {found[0]}"
    if offline:
        return f"missing: not in {', '.join(map(str, data_folders(data_dir)))}"
    megabytes = sum(archive.size for archive in data_set.archives) / 1e6
    return f"to be downloaded ({megabytes:.0f} MB) to {data_folders(data_dir)[0]}"


def data_folders(data_dir: Path | None) -> list[Path]:
    """The search order: `data_dir`, $EGTRAIN_DATA, the user cache; downloads go to the first."""
    folders = [] if data_dir is None else [data_dir.expanduser()]
    if from_environment := os.environ.get("EGTRAIN_DATA"):
        folders.append(Path(from_environment).expanduser())
    cache = os.environ.get("XDG_CACHE_HOME")
    folders.append((Path(cache) if cache else Path.home() / ".cache") / "egtrain")
    return list(dict.fromkeys(folders))


def find(data_set: DataSet[AnyLayout], data_dir: Path | None) -> tuple[Path, AnyLayout] | None:
    """The first complete distribution on disk: its folder and its layout; None where there is not
    even a part of one.

    A folder of the search order may hold the distribution's folder or be it. Raises `DataError`
    where a folder is incomplete and no other place has a complete one.
    """
    incomplete = None
    for folder in data_folders(data_dir):
        for layout in data_set.layouts:
            for candidate in (folder / layout.folder, folder):
                missing = _missing_files(candidate, layout)
                if not missing:
                    return candidate, layout
                # The folder itself is only taken for a broken distribution if its name says that it
                # is one.
                if candidate.name == layout.folder and len(missing) < len(layout.files):
                    incomplete = incomplete or (candidate, missing)
    if incomplete:
        candidate, missing = incomplete
        raise DataError(
            f"{candidate}: {data_set.title} is incomplete, {', '.join(missing)} missing; add what "
            "is missing, or delete"
            " the folder to have the data downloaded again"
        )
    return None


def find_or_download(
    data_set: DataSet[AnyLayout], data_dir: Path | None, offline: bool
) -> tuple[Path, AnyLayout]:
    """As `find`, but data that are not there are downloaded into the first folder of the search
    order.

    Several processes may ask at once: one downloads, the others wait for it. Raises `DataError`,
    with every place that was looked at, where `offline` forbids the download or no server delivers;
    `EgtrainError` where the disk is full.
    """
    if found := find(data_set, data_dir):
        return found
    folders = data_folders(data_dir)
    looked_at = f"{data_set.title} was not found in {', '.join(map(str, folders))}"
    if offline:
        raise NotDownloaded(
            f"{looked_at} and must not be downloaded (--offline, --dry-run); name the folder that "
            "holds"
            f" {_folder_names(data_set)} with --data-dir, or use --data synthetic"
        )
    target = folders[0]
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _lock(target) as alone:
            if found := find(data_set, data_dir):
                return found
            problems = _download(data_set, target, alone)
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(target, data_set) from problem
        raise DataError(
            f"{target}: cannot be written ({problem.strerror or problem}); name another folder "
            "with --data-dir"
        ) from problem
    if problems:
        raise DataError(
            f"{looked_at} and could not be downloaded ({'; '.join(problems)}); check the network, "
            "name the folder that"
            f" holds {_folder_names(data_set)} with --data-dir, or use --data synthetic"
        )
    return target / data_set.layouts[0].folder, data_set.layouts[0]


def _folder_names(data_set: DataSet[Layout]) -> str:
    return " or ".join(dict.fromkeys(layout.folder for layout in data_set.layouts))


def _missing_files(folder: Path, layout: Layout) -> list[str]:
    try:
        return [file.name for file in layout.files if not (folder / file.name).is_file()]
    except OSError as problem:
        raise DataError(
            f"{folder}: cannot be read ({problem.strerror or problem}); change its permissions or "
            "name another folder"
            " with --data-dir"
        ) from problem


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Wait for and hold the folder itself, so that no lock file is left behind; False on file
    systems without locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)


def _disk_full(folder: Path, data_set: DataSet[Layout]) -> EgtrainError:
    return EgtrainError(
        f"{folder}: the disk is full, {shutil.disk_usage(folder).free:,} bytes are free and "
        f"{bytes_needed(data_set):,}"
        f" are needed for {data_set.title}; make room or name another folder with --data-dir"
    )


def _download(data_set: DataSet[Layout], target: Path, alone: bool) -> list[str]:
    """Put the data set into `target`; on failure say for each server of the first missing archive
    why.
    """
    layout = data_set.layouts[0]
    for leftover in target.glob(f"{_TEMPORARY}*") if alone else ():
        # Of a process that was killed: nobody else is at work.
        shutil.rmtree(leftover, ignore_errors=True)
    destination = target / layout.folder
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise DataError(
            f"{destination}: in the way of the download, and not {data_set.title}; move it, or "
            "name another folder with"
            " --data-dir"
        )
    if shutil.disk_usage(target).free < bytes_needed(data_set):
        raise _disk_full(target, data_set)
    # The folder goes away with everything in it, whatever happens: also on Ctrl-C.
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=target) as temporary:
        whole = Path(temporary) / layout.folder
        whole.mkdir()
        for archive in data_set.archives:
            problems = _download_part(archive, whole, layout, target)
            if problems:
                return problems
        _sync_folder(whole)
        whole.rename(destination)
        _sync_folder(target)
    return []


def _download_part(archive: Archive, whole: Path, layout: Layout, target: Path) -> list[str]:
    """Put one archive's files into `whole`; where no server delivers, say why."""
    problems = []
    for number, address in enumerate(archive.addresses, start=1):
        with tempfile.TemporaryDirectory(dir=whole.parent) as temporary:
            file, unpacked = Path(temporary) / archive.name, Path(temporary) / "unpacked"
            unpacked.mkdir()
            try:
                _receive(address, file, archive, target, hasten=number < len(archive.addresses))
                unpack(file, unpacked, layout)
            except _Refused as problem:
                problems.append(f"{urllib.parse.urlsplit(address).hostname}: {problem}")
                continue
            for part in unpacked.iterdir():
                part.rename(whole / part.name)
            return []
    return problems


class _Refused(Exception):
    """What a server sent, or did not send, cannot be used; the message says why."""


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not newurl.startswith("https://"):
            raise _Refused("it redirects to an address that is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(address: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    if not address.startswith("https://"):
        raise _Refused("its address is not https")
    opener = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=ssl.create_default_context()), _OnlyHttps()
    )
    request = urllib.request.Request(address, headers={"User-Agent": "egtrain"})
    response: contextlib.AbstractContextManager[IO[bytes]] = opener.open(request, timeout=TIMEOUT)
    return response


def _receive(address: str, file: Path, archive: Archive, target: Path, hasten: bool) -> None:
    """Download to `file` and sync it; refuse anything but the archive with the known size and
    hash.
    """
    console = Console(stderr=True)
    console.print(
        f"downloading {archive.name} ({archive.size / 1e6:.0f} MB) from "
        f"{urllib.parse.urlsplit(address).hostname}"
        f" to {target}",
        highlight=False,
        soft_wrap=True,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    digest = hashlib.sha256()
    received = 0
    start = time.monotonic()
    with _network_problems():
        connection = _open(address)
    with (
        connection as response,
        file.open("xb") as output,
        Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as progress,
    ):
        bar = progress.add_task(archive.name, total=archive.size)
        while True:
            with _network_problems():
                chunk = response.read(CHUNK)
            if not chunk:
                break
            received += len(chunk)
            if received > archive.size:
                raise _Refused(f"it sends more than the {archive.size:,} bytes expected")
            digest.update(chunk)
            output.write(chunk)
            progress.update(bar, completed=received)
            waited = time.monotonic() - start
            if hasten and waited > PATIENCE and received < SLOWEST * waited:
                raise _Refused(f"it sends only {received / waited / 1000:.0f} kB a second")
        output.flush()
        os.fsync(output.fileno())
    if received < archive.size:
        raise _Refused(f"it sent {received:,} of {archive.size:,} bytes")
    if digest.hexdigest() != archive.sha256:
        raise _Refused(f"it sent sha256 {digest.hexdigest()}, expected {archive.sha256}")


@contextlib.contextmanager
def _network_problems() -> Iterator[None]:
    """Only around what talks to the server: an OSError of the disk is another matter."""
    try:
        yield
    except urllib.error.HTTPError as problem:
        raise _Refused(f"HTTP status {problem.code}") from problem
    except urllib.error.URLError as problem:
        raise _Refused(str(problem.reason)) from problem
    except (http.client.HTTPException, OSError) as problem:
        raise _Refused(str(problem) or type(problem).__name__) from problem


def unpack(file: Path, target: Path, layout: Layout) -> None:
    """Write the files of `layout`, or the one that a .gz holds, and nothing else into `target`.

    A .tar.gz or .zip has them in the layout's folder; read-me files and the like are passed over.
    Raises `_Refused` for an archive with an absolute path, a `..`, a link, a device, a file twice
    or one of an unexpected size, wanted or not: it is not what it claims to be.
    """
    expected = {f"{layout.folder}/{each.name}": each.size for each in layout.files}
    unreadable = (
        tarfile.TarError,
        zipfile.BadZipFile,
        gzip.BadGzipFile,
        EOFError,
        zlib.error,
        NotImplementedError,
    )
    try:
        if file.name.endswith(".tar.gz"):
            with tarfile.open(file, "r:gz") as archive:
                _write_members(_tar_members(archive), target, expected)
        elif file.name.endswith(".zip"):
            with zipfile.ZipFile(file) as zipped:
                _write_members(_zip_members(zipped), target, expected)
        else:
            path = f"{layout.folder}/{file.name.removesuffix('.gz')}"
            with gzip.open(file) as content:
                # One byte more than expected tells that there are more.
                whole = content.read(expected[path] + 1)
            _write_members(
                [(path, len(whole), lambda: io.BytesIO(whole))], target, {path: expected[path]}
            )
    except unreadable as problem:
        raise _Refused(f"its archive cannot be read ({problem})") from problem


Member = tuple[str, int, Callable[[], IO[bytes]]]
"""Path in the archive, size, and how to open it."""


def _tar_members(archive: tarfile.TarFile) -> Iterator[Member]:
    for member in archive:
        if member.isdir() and _is_inside(member.name):
            continue
        if not member.isreg() and _is_inside(member.name):
            raise _Refused(f"its archive holds {member.name!r}, which is no plain file")
        yield member.name, member.size, functools.partial(_extracted, archive, member)


def _extracted(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    assert content is not None  # it is a plain file
    return content


def _zip_members(archive: zipfile.ZipFile) -> Iterator[Member]:
    for member in archive.infolist():
        if not member.is_dir():
            yield member.filename, member.file_size, functools.partial(archive.open, member)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _write_members(members: Iterable[Member], target: Path, expected: Mapping[str, int]) -> None:
    seen: set[str] = set()
    for name, size, opened in members:
        if not _is_inside(name):
            raise _Refused(f"its archive holds {name!r}, a path outside its folder")
        path = str(PurePosixPath(name))
        if path in seen or len(seen) == LARGEST_ARCHIVE:
            raise _Refused(f"its archive holds {name!r} twice or too many files")
        seen.add(path)
        wanted = expected.get(path)
        if size != wanted if wanted is not None else size > LARGEST_EXTRA:
            raise _Refused(f"its archive holds {name!r} with an unexpected {size:,} bytes")
        if wanted is not None:
            with opened() as content, (target / PurePosixPath(path).name).open("xb") as output:
                shutil.copyfileobj(content, output, CHUNK)
                output.flush()
                os.fsync(output.fileno())
    if missing := expected.keys() - seen:
        raise _Refused(f"its archive lacks {', '.join(sorted(missing))}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
