"""Where data lie on disk, and the checked download of what is not there."""

import contextlib
import errno
import fcntl
import gzip
import hashlib
import http.client
import os
import shutil
import ssl
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from egtrain.data.cifar import Archive, Cifar, Layout
from egtrain.errors import DataError, EgtrainError

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


def data_folders(data_dir: Path | None) -> list[Path]:
    """The search order: `data_dir`, $EGTRAIN_DATA, the user cache; downloads go to the first."""
    folders = [] if data_dir is None else [data_dir.expanduser()]
    if from_environment := os.environ.get("EGTRAIN_DATA"):
        folders.append(Path(from_environment).expanduser())
    cache = os.environ.get("XDG_CACHE_HOME")
    folders.append((Path(cache) if cache else Path.home() / ".cache") / "egtrain")
    return list(dict.fromkeys(folders))


def find(cifar: Cifar, data_dir: Path | None) -> tuple[Path, Layout] | None:
    """The first complete distribution on disk: its folder and its layout; None where there is not even a part of one.

    A folder of the search order may hold the distribution's folder or be it. Raises `DataError` where a folder is
    incomplete and no other place has a complete one.
    """
    incomplete = None
    for folder in data_folders(data_dir):
        for layout in cifar.layouts:
            for candidate in (folder / layout.folder, folder):
                missing = _missing_files(candidate, layout)
                if not missing:
                    return candidate, layout
                # The folder itself is only taken for a broken distribution if its name says that it is one.
                if candidate.name == layout.folder and len(missing) < len(layout.files):
                    incomplete = incomplete or (candidate, missing)
    if incomplete:
        candidate, missing = incomplete
        raise DataError(
            f"{candidate}: {cifar.title} is incomplete, {', '.join(missing)} missing; add what is missing, or delete"
            " the folder to have the data downloaded again"
        )
    return None


def find_or_download(cifar: Cifar, data_dir: Path | None, offline: bool) -> tuple[Path, Layout]:
    """As `find`, but data that are not there are downloaded into the first folder of the search order.

    Several processes may ask at once: one downloads, the others wait for it. Raises `DataError`, with every place that
    was looked at, where `offline` forbids the download or no server delivers; `EgtrainError` where the disk is full.
    """
    if found := find(cifar, data_dir):
        return found
    folders = data_folders(data_dir)
    looked_at = f"{cifar.title} was not found in {', '.join(map(str, folders))}"
    if offline:
        raise DataError(
            f"{looked_at} and --offline forbids to download it; name the folder that holds"
            f" {' or '.join(layout.folder for layout in cifar.layouts)} with --data-dir, or use --data synthetic"
        )
    target = folders[0]
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _lock(target) as alone:
            if found := find(cifar, data_dir):
                return found
            problems = _download(cifar, target, alone)
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(target, cifar.archive) from problem
        raise DataError(
            f"{target}: cannot be written ({problem.strerror or problem}); name another folder with --data-dir"
        ) from problem
    if problems:
        raise DataError(
            f"{looked_at} and could not be downloaded ({'; '.join(problems)}); check the network, name the folder that"
            f" holds {' or '.join(layout.folder for layout in cifar.layouts)} with --data-dir, or use --data synthetic"
        )
    return target / cifar.archive.layout.folder, cifar.archive.layout


def _missing_files(folder: Path, layout: Layout) -> list[str]:
    try:
        return [file.name for file in layout.files if not (folder / file.name).is_file()]
    except OSError as problem:
        raise DataError(
            f"{folder}: cannot be read ({problem.strerror or problem}); change its permissions or name another folder"
            " with --data-dir"
        ) from problem


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Wait for and hold the folder itself, so that no lock file is left behind; False on file systems without locks."""
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


def _disk_full(folder: Path, archive: Archive) -> EgtrainError:
    needed = archive.size + archive.layout.size
    return EgtrainError(
        f"{folder}: the disk is full, {shutil.disk_usage(folder).free:,} bytes are free and {needed:,} are needed for"
        f" {archive.name}; make room or name another folder with --data-dir"
    )


def _download(cifar: Cifar, target: Path, alone: bool) -> list[str]:
    """Put the distribution into `target`; on failure say for each server why."""
    archive = cifar.archive
    for leftover in target.glob(f"{_TEMPORARY}*") if alone else ():
        # Of a process that was killed: nobody else is at work.
        shutil.rmtree(leftover, ignore_errors=True)
    destination = target / archive.layout.folder
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise DataError(
            f"{destination}: in the way of the download, and not {cifar.title}; move it, or name another folder with"
            " --data-dir"
        )
    if shutil.disk_usage(target).free < archive.size + archive.layout.size:
        raise _disk_full(target, archive)
    problems = []
    for number, address in enumerate(archive.addresses, start=1):
        # The folder goes away with everything in it, whatever happens: also on Ctrl-C.
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=target) as temporary:
            file = Path(temporary) / archive.name
            try:
                _receive(address, file, archive, target, hasten=number < len(archive.addresses))
                unpack(file, Path(temporary), archive.layout)
            except _Refused as problem:
                problems.append(f"{urllib.parse.urlsplit(address).hostname}: {problem}")
                continue
            (Path(temporary) / archive.layout.folder).rename(destination)
            _sync_folder(target)
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
    """Download to `file` and sync it; refuse anything but the archive with the known size and hash."""
    console = Console(stderr=True)
    console.print(
        f"downloading {archive.name} ({archive.size / 1e6:.0f} MB) from {urllib.parse.urlsplit(address).hostname}"
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
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
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
    """Write the files of `layout`, and nothing else, from a .tar.gz to their folder in `target`.

    Read-me files and the like are passed over. Raises `_Refused` for an archive with an absolute path, a `..`, a link,
    a device, a file twice or one of an unexpected size, wanted or not: it is not what it claims to be.
    """
    expected = {f"{layout.folder}/{each.name}": each.size for each in layout.files}
    folder = target / layout.folder
    folder.mkdir()
    seen: set[str] = set()
    try:
        with tarfile.open(file, "r:gz") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise _Refused(f"its archive holds {member.name!r}, a path outside its folder")
                if member.isdir():
                    continue
                if not member.isreg():
                    raise _Refused(f"its archive holds {member.name!r}, which is no plain file")
                size = expected.get(str(path))
                if str(path) in seen or len(seen) == LARGEST_ARCHIVE:
                    raise _Refused(f"its archive holds {member.name!r} twice or too many files")
                seen.add(str(path))
                if member.size != size if size is not None else member.size > LARGEST_EXTRA:
                    raise _Refused(f"its archive holds {member.name!r} with an unexpected {member.size:,} bytes")
                content = archive.extractfile(member) if size is not None else None
                if content is not None:
                    with content, (folder / path.name).open("xb") as output:
                        shutil.copyfileobj(content, output, CHUNK)
                        output.flush()
                        os.fsync(output.fileno())
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as problem:
        raise _Refused(f"its archive cannot be read ({problem})") from problem
    if missing := expected.keys() - seen:
        raise _Refused(f"its archive lacks {', '.join(sorted(missing))}")
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
