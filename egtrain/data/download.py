"""The download of a public data set, which leaves either the checked files or nothing."""

import contextlib
import gzip
import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from egtrain import disk
from egtrain.data.finding import Archive, DataSet, Found, Layout, data_folders, find, not_found
from egtrain.errors import DataError, EgtrainError
from egtrain.formatting import size_text
from egtrain.progress import Progress

TIMEOUT = 20.0
"""Seconds without a byte before giving up on a server."""
PATIENCE = 30.0
"""Seconds before a server slower than `SLOWEST` is given up for the next one."""
SLOWEST = 100_000
"""Bytes per second."""
CHUNK = 1 << 18
_TEMPORARY = ".egtrain-download-"


def find_or_download(data_set: DataSet, data_dir: Path | None, offline: bool) -> Found:
    """Return a data set on disk; download it into the first folder of the search if it is missing.

    Several processes may ask at once: one downloads, the others wait for it.

    Raises:
        DataError: `offline` forbids the download, or no server delivers.
        EgtrainError: the disk is full.
    """
    if found := find(data_set, data_dir):
        return found
    if offline:
        raise not_found(data_set, data_dir)
    target = data_folders(data_dir)[0]
    try:
        target.mkdir(parents=True, exist_ok=True)
        with disk.locked(target) as alone:
            if found := find(data_set, data_dir):
                return found
            _download(data_set, target, alone)
    except OSError as problem:
        if problem.errno in disk.FULL:
            raise EgtrainError(
                f"{target}: the disk is full ({shutil.disk_usage(target).free:,} bytes are free); "
                f"make room for {data_set.title}, or name another folder with --data-dir"
            ) from problem
        raise DataError(
            f"{target}: cannot be written ({problem.strerror or problem}); name another folder "
            "with --data-dir"
        ) from problem
    return Found(data_set, target / data_set.layouts[0].folder, data_set.layouts[0])


def _download(data_set: DataSet, target: Path, alone: bool) -> None:
    layout = data_set.layouts[0]
    for leftover in target.glob(f"{_TEMPORARY}*") if alone else ():
        # Left by a process that was killed, since this one holds the lock.
        shutil.rmtree(leftover, ignore_errors=True)
    destination = target / layout.folder
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise DataError(
            f"{destination}: in the way of the download and not {data_set.title}; move it, or "
            "name another folder with --data-dir"
        )
    # The temporary folder is deleted whatever happens, even on Ctrl-C.
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=target) as temporary:
        whole = Path(temporary) / layout.folder
        whole.mkdir()
        for archive in data_set.archives:
            file = Path(temporary) / archive.name
            if problems := _receive_from_any(archive, file, target):
                raise DataError(
                    f"{data_set.title} could not be downloaded to {target} "
                    f"({'; '.join(problems)}); check the network, name the folder that holds "
                    f"{data_set.folders} with --data-dir, or use --data synthetic"
                )
            unpack(file, layout, whole)
            file.unlink()
        disk.sync_folder(whole)
        whole.rename(destination)
        disk.sync_folder(target)


def _receive_from_any(archive: Archive, file: Path, target: Path) -> list[str]:
    """Download an archive from the first server that delivers it, or return each one's problem."""
    problems = []
    for number, address in enumerate(archive.addresses, start=1):
        try:
            _receive(address, file, archive, target, hasten=number < len(archive.addresses))
            return []
        except _Refused as problem:
            problems.append(f"{urllib.parse.urlsplit(address).hostname}: {problem}")
    return problems


class _Refused(Exception):
    """A server did not send the archive; the message says why."""


def _open(address: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    request = urllib.request.Request(address, headers={"User-Agent": "egtrain"})
    response: contextlib.AbstractContextManager[IO[bytes]] = urllib.request.urlopen(
        request, timeout=TIMEOUT
    )
    return response


def _receive(address: str, file: Path, archive: Archive, target: Path, hasten: bool) -> None:
    """Download to `file`; refuse anything but the archive with the known size and hash."""
    digest = hashlib.sha256()
    received = 0
    start = time.monotonic()
    with Progress(sys.stderr) as progress, progress.bar(archive.name, archive.size) as bar:
        progress.message(
            f"downloading {archive.name} ({size_text(archive.size)}) from "
            f"{urllib.parse.urlsplit(address).hostname} to {target}"
        )
        with _network_problems():
            connection = _open(address)
        with connection as response, file.open("wb") as output:
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
                waited = time.monotonic() - start
                bar.update(received, beside=f"{size_text(received / max(waited, 1e-9))}/s")
                if hasten and waited > PATIENCE and received < SLOWEST * waited:
                    raise _Refused(f"it sends only {received / waited / 1000:.0f} kB per second")
    if received < archive.size:
        raise _Refused(f"it sent {received:,} of {archive.size:,} bytes")
    if digest.hexdigest() != archive.sha256:
        raise _Refused(f"it sent sha256 {digest.hexdigest()}, expected {archive.sha256}")


@contextlib.contextmanager
def _network_problems() -> Iterator[None]:
    """Turn network errors into `_Refused`; not for writing, since disks raise OSError too."""
    try:
        yield
    except (http.client.HTTPException, OSError) as problem:
        status = isinstance(problem, urllib.error.HTTPError)
        reason = problem if status else getattr(problem, "reason", problem)
        raise _Refused(str(reason) or type(problem).__name__) from problem


def unpack(file: Path, layout: Layout, target: Path) -> None:
    """Write the files of `layout` from an archive into `target`, and nothing else.

    Names in the archive only select files of the layout, so nothing can be written elsewhere.
    """
    wanted = {f"{layout.folder}/{each.name}": target / each.name for each in layout.files}
    for name, content in _members(file, layout.folder):
        if path := wanted.get(str(PurePosixPath(name))):
            with content, path.open("wb") as output:
                shutil.copyfileobj(content, output, CHUNK)
                output.flush()
                os.fsync(output.fileno())


def _members(file: Path, folder: str) -> Iterator[tuple[str, IO[bytes] | gzip.GzipFile]]:
    """Yield each plain file's path in the archive and its content."""
    if file.name.endswith(".tar.gz"):
        with tarfile.open(file, "r:gz") as tar:
            for member in tar:
                if member.isreg() and (content := tar.extractfile(member)):
                    yield member.name, content
    elif file.name.endswith(".zip"):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                yield name, archive.open(name)
    else:
        with gzip.open(file) as unpacked:
            yield f"{folder}/{file.name.removesuffix('.gz')}", unpacked
