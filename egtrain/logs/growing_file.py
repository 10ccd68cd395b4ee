"""A file of records that is written while the disk may fill up."""

import os
from collections.abc import Callable
from pathlib import Path


class GrowingFile:
    """A file of records. What a full disk refuses waits in memory, so none is lost or torn."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path = path
        self._warn = warn
        self._warned = False
        self._waiting = bytearray()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, data: bytes) -> None:
        """Append a record."""
        self._waiting += data
        try:
            while self._waiting:
                written = os.write(self._file, self._waiting)
                del self._waiting[:written]
        except OSError as error:
            self._report(error)

    def sync(self) -> None:
        """Write and sync everything."""
        self.write(b"")
        try:
            os.fsync(self._file)
        except OSError as error:
            self._report(error)

    def close(self) -> None:
        """Write and sync everything, and close the file."""
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1

    def _report(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            self._warn(
                f"cannot write {self._path} ({error.strerror}); training goes on and tries again"
            )
