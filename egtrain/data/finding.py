"""Where data lie on disk, and whether they are the published ones."""

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
    """Hex digest of what it holds, unpacked: MD5, SHA-1 or SHA-256. None where nobody publishes
    one."""


@dataclass(frozen=True)
class Layout:
    """One way in which a data set lies on disk."""

    folder: str
    files: tuple[File, ...]


@dataclass(frozen=True)
class Archive:
    """What is to be downloaded: a .tar.gz or .zip of the first layout's folder, or one of its
    files as .gz.
    """

    name: str
    sha256: str
    size: int
    """Bytes."""
    addresses: tuple[str, ...]
    """Mirrors, tried in this order."""


@dataclass(frozen=True)
class DataSet:
    """A public data set: how it may lie on disk, and where it comes from."""

    title: str
    layouts: tuple[Layout, ...]
    """The first is what the archives hold."""
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
    """A public parallel text: files that are named PART.LANGUAGE, a sentence a line."""

    parts: tuple[str, str, str]
    """What the files of training, validation and test are called."""
    languages: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """A data set on disk."""

    data_set: DataSet
    folder: Path
    layout: Layout

    def read(self, name: str) -> bytes:
        """Return what one of its files holds, unpacked.

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
        """Return the error for a file that is damaged or another than the published one."""
        return DataError(
            f"{self.folder / name}: not the official file of {self.data_set.title} ({reason}); "
            "delete the folder to have it downloaded, name another one with --data-dir, or read it "
            "as your own data with --data npz:FILE, text:FOLDER or pairs:FOLDER"
        )


def data_folders(data_dir: Path | None) -> list[Path]:
    """The search order: `data_dir`, $EGTRAIN_DATA, the user cache; downloads go to the first."""
    folders = [] if data_dir is None else [data_dir.expanduser()]
    if from_environment := os.environ.get("EGTRAIN_DATA"):
        folders.append(Path(from_environment).expanduser())
    return list(dict.fromkeys([*folders, cache_folder()]))


def cache_folder() -> Path:
    """Return the user cache, $XDG_CACHE_HOME/egtrain or ~/.cache/egtrain."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "egtrain"


def find(data_set: DataSet, data_dir: Path | None) -> Found | None:
    """The first complete distribution on disk; None where there is not even a part of one.

    A folder of the search order may hold the distribution's folder or be it. Raises `DataError`
    where a folder is incomplete and no other place has a complete one.
    """
    incomplete = None
    for folder in data_folders(data_dir):
        for layout in data_set.layouts:
            for candidate in (folder / layout.folder, folder):
                missing = _missing_files(candidate, layout)
                if not missing:
                    return Found(data_set, candidate, layout)
                # The folder itself is only taken for a broken distribution if its name says that it
                # is one.
                if candidate.name == layout.folder and len(missing) < len(layout.files):
                    incomplete = incomplete or (candidate, missing)
    if incomplete:
        candidate, missing = incomplete
        raise DataError(
            f"{candidate}: {data_set.title} is incomplete, {', '.join(missing)} missing; add what "
            "is missing, or delete the folder to have the data downloaded again"
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
    """Return the error for a data set that must not be downloaded, with every place looked at."""
    return NotDownloaded(
        f"{data_set.title} was not found in {', '.join(map(str, data_folders(data_dir)))} and must "
        "not be downloaded (--offline, --dry-run); name the folder that holds "
        f"{data_set.folders} with --data-dir, or use --data synthetic"
    )


def locate(name: str, data_set: DataSet | None, data_dir: Path | None, offline: bool) -> str:
    """Say in a few words where data would be taken from; reads no data and downloads nothing.

    `data_set` is None for what is no public data set. Raises `DataError` where one on disk lacks
    files.
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
    """Return a user's file or folder: as it is named after the colon, or else within the first of
    the data folders that has it.
    """
    path = _path_of(name)
    places = [path, *(folder / path for folder in data_folders(data_dir))]
    if data_dir is not None:
        places.append(data_dir / path.name)  # it has moved there
    return next((place for place in places if place.exists()), None)


def require_own(name: str, data_dir: Path | None, form: str) -> Path:
    """Return a user's file or folder; `form` says how it is named and what it holds.

    Raises:
        DataError: it is nowhere.
    """
    if found := find_own(name, data_dir):
        return found
    places = ", ".join(map(str, data_folders(data_dir)))
    raise DataError(f"{_path_of(name)}: no such file or folder, here or in {places}; give {form}")


def _path_of(name: str) -> Path:
    return Path(name.partition(":")[2]).expanduser()


def read_file(path: Path) -> bytes:
    """Return what a file holds, unpacked where its name ends with .gz.

    Raises:
        DataError: it cannot be read.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise DataError(
            f"{path}: cannot be read ({reason}); mend the file, or name other data with --data or "
            "--data-dir"
        ) from problem


def note_of_part(name: str, used: int, available: int, what: str) -> tuple[str, ...]:
    """Return what to tell where a preset leaves out a part of a user's own training data."""
    if ":" not in name or used == available:
        return ()
    return (
        f"only {used:,} of your {available:,} training {what} are used; --set "
        "data.train_samples=null uses all",
    )
