"""Where data are on disk, and whether they are the published ones."""

import gzip
import hashlib
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from egtrain.errors import DataError, NotDownloaded
from egtrain.formatting import size_text

if TYPE_CHECKING:
    from egtrain.data.arrays import ImageArrays

_ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256"}
"""By the length of the hex digest."""


@dataclass(frozen=True)
class File:
    """A file of a public data set."""

    name: str
    digest: str | None = None
    """Hex digest of its unpacked content: MD5, SHA-1 or SHA-256; None if none is published."""


@dataclass(frozen=True)
class Layout:
    """One way in which a data set is stored on disk."""

    folder: str
    files: tuple[File, ...]


@dataclass(frozen=True)
class Archive:
    """A download: a .tar.gz or .zip of the first layout's folder, or one of its files as .gz."""

    name: str
    sha256: str
    size: int
    """Bytes."""
    addresses: tuple[str, ...]
    """Mirrors, tried in this order."""


@dataclass(frozen=True)
class DataSet:
    """A public data set: how it may be stored on disk, and where it comes from."""

    title: str
    layouts: tuple[Layout, ...]
    """The first is that of the archives."""
    archives: tuple[Archive, ...]

    @property
    def folders(self) -> str:
        """The names that its folder may have, for messages."""
        return " or ".join(dict.fromkeys(layout.folder for layout in self.layouts))


@dataclass(frozen=True)
class ImageSet(DataSet):
    """A public set of images."""

    read: Callable[["Found"], "ImageArrays"]


@dataclass(frozen=True)
class PairSet(DataSet):
    """A public parallel text: files named PART.LANGUAGE, with one sentence per line."""

    parts: tuple[str, str, str]
    """PART for training, validation and test."""
    languages: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """A data set on disk."""

    data_set: DataSet
    folder: Path
    layout: Layout

    def read(self, name: str) -> bytes:
        """Return the unpacked content of one of its files.

        Raises:
            DataError: it cannot be read, or is not the published file.
        """
        file = next(f for f in self.layout.files if f.name.removesuffix(".gz") == name)
        content = read_file(self.folder / file.name)
        if file.digest is not None:
            algorithm = _ALGORITHMS[len(file.digest)]
            digest = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
            if digest != file.digest:
                raise self.not_official(
                    name, f"{len(content):,} bytes with {algorithm} {digest}, not {file.digest}"
                )
        return content

    def not_official(self, name: str, reason: str) -> DataError:
        """Return the error for a file that is damaged or not the published one."""
        return DataError(
            f"{self.folder / name}: not the official file of {self.data_set.title} ({reason}); "
            "delete the folder to have it downloaded, name another one with --data-dir, or read it "
            "as your own data with --data npz:FILE, text:FOLDER or pairs:FOLDER"
        )


def data_folders(data_dir: Path | None) -> list[Path]:
    """Return where to search: `data_dir`, $EGTRAIN_DATA, user cache; downloads go to the first."""
    folders = [] if data_dir is None else [data_dir.expanduser()]
    if from_environment := os.environ.get("EGTRAIN_DATA"):
        folders.append(Path(from_environment).expanduser())
    return list(dict.fromkeys([*folders, cache_folder()]))


def cache_folder() -> Path:
    """Return the user cache, $XDG_CACHE_HOME/egtrain or ~/.cache/egtrain."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "egtrain"


def find(data_set: DataSet, data_dir: Path | None) -> Found | None:
    """Return the first complete distribution on disk; None if there is not even a part of one.

    Each folder of the search may contain the distribution's folder or be that folder.

    Raises:
        DataError: a distribution is incomplete, and no other place has a complete one.
    """
    incomplete = None
    for folder in data_folders(data_dir):
        for layout in data_set.layouts:
            for candidate in (folder / layout.folder, folder):
                missing = _missing_files(candidate, layout)
                if not missing:
                    return Found(data_set, candidate, layout)
                # A folder counts as a broken distribution only if it has the right name.
                if candidate.name == layout.folder and len(missing) < len(layout.files):
                    incomplete = incomplete or (candidate, missing)
    if incomplete:
        candidate, missing = incomplete
        raise DataError(
            f"{candidate}: {data_set.title} is incomplete, {', '.join(missing)} missing; add the "
            "files, or delete the folder to have the data downloaded again"
        )
    return None


def _missing_files(folder: Path, layout: Layout) -> list[str]:
    try:
        return [file.name for file in layout.files if not (folder / file.name).is_file()]
    except OSError as problem:
        raise DataError(
            f"{folder}: cannot be read ({problem.strerror or problem}); change its permissions or "
            "name another folder with --data-dir"
        ) from problem


def not_found(data_set: DataSet, data_dir: Path | None) -> NotDownloaded:
    """Return the error for missing data that must not be downloaded, with every place searched."""
    return NotDownloaded(
        f"{data_set.title} was not found in {', '.join(map(str, data_folders(data_dir)))} and must "
        "not be downloaded (--offline, --dry-run); name the folder that holds "
        f"{data_set.folders} with --data-dir, or use --data synthetic"
    )


def locate(name: str, data_set: DataSet | None, data_dir: Path | None, offline: bool) -> str:
    """Say in a few words where data would come from; reads no data and downloads nothing.

    `data_set` is None for data that are not public.

    Raises:
        DataError: a public data set on disk lacks files.
    """
    if name == "synthetic":
        return "made when needed"
    if data_set is None:
        path = find_own(name, data_dir)
        return f"found: {path}" if path else f"missing: {_path_of(name)}"
    if found := find(data_set, data_dir):
        return f"found: {found.folder}"
    folders = data_folders(data_dir)
    if offline:
        return f"missing: not in {', '.join(map(str, folders))}"
    size = sum(archive.size for archive in data_set.archives)
    return f"to be downloaded ({size_text(size)}) to {folders[0]}"


def find_own(name: str, data_dir: Path | None) -> Path | None:
    """Return a user's file or folder: the path after the colon, here or in the data folders."""
    path = _path_of(name)
    places = [path, *(folder / path for folder in data_folders(data_dir))]
    if data_dir is not None:
        places.append(data_dir / path.name)  # it may have moved there
    return next((place for place in places if place.exists()), None)


def require_own(name: str, data_dir: Path | None, form: str) -> Path:
    """Return a user's file or folder; `form` says how it is named and what it holds.

    Raises:
        DataError: it was not found.
    """
    if found := find_own(name, data_dir):
        return found
    places = ", ".join(map(str, data_folders(data_dir)))
    raise DataError(f"{_path_of(name)}: no such file or folder, here or in {places}; give {form}")


def _path_of(name: str) -> Path:
    return Path(name.partition(":")[2]).expanduser()


def read_file(path: Path) -> bytes:
    """Return the content of a file, unpacked if its name ends with .gz.

    Raises:
        DataError: it cannot be read.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise DataError(
            f"{path}: cannot be read ({reason}); repair the file, or name other data with --data "
            "or --data-dir"
        ) from problem


def note_of_part(name: str, used: int, available: int, what: str) -> tuple[str, ...]:
    """Return a note for the user if a part of their own training data is left out."""
    if ":" not in name or used == available:
        return ()
    return (
        f"only {used:,} of your {available:,} training {what} are used; --set "
        "data.train_samples=null uses all",
    )
