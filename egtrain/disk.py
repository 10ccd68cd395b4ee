"""Files that are written whole or not at all, and what the disk has to do for that."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from egtrain.errors import EgtrainError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, a used-up quota or a file at its size limit."""


def sync_folder(folder: Path) -> None:
    """Sync the names of a folder's files to the disk, if the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync a folder, and need not.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a kill, a power cut or a full disk leaves the old content or the new.

    Raises:
        EgtrainError: it could not be written.
    """
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(
    path: Path, kill_at: Callable[[str], object] = lambda point: None
) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`, which replaces `path` once it is on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            kill_at("save-before-sync")
            os.fsync(file.fileno())
        kill_at("save-before-rename")
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def cannot_write(path: Path, error: OSError) -> EgtrainError:
    """Return the error for the user; call it once the temporary file is gone."""
    folder = next(folder for folder in [*path.parents, Path()] if folder.is_dir())
    remedy = "free some space" if error.errno in FULL else "make the folder writable"
    return EgtrainError(
        f"cannot write {path}: {error.strerror or error}, {shutil.disk_usage(folder).free} bytes "
        f"are free there; {remedy}, then start again, or go on with --resume: what was saved "
        "before is intact"
    )


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Lock the folder itself, which leaves no lock file; yield False if the file system cannot."""
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
