"""The folders that look like runs, below given ones."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from egtrain.errors import UsageError
from egtrain.run_directory import CHECKPOINTS, CONFIG

WITHOUT_RUNS = {CHECKPOINTS, "over_samples"}
"""Folders of a run that hold no other run."""


class Found(NamedTuple):
    """A folder with a config.yaml."""

    path: Path
    files: frozenset[str]
    """The names of its regular files."""


def run_folders(folders: Iterable[Path], problems: list[str]) -> Iterator[Found]:
    """Yield each folder with a config.yaml once, however deep.

    Symbolic links are followed to runs, and not to folders of runs. Hidden folders are not
    searched.

    Args:
        folders: where to search.
        problems: takes a line for each folder below them that cannot be searched.

    Raises:
        UsageError: one of the given folders cannot be searched.
    """
    seen: set[tuple[int, int]] = set()
    for folder in folders:
        try:
            os.scandir(folder).close()
        except OSError as error:
            raise UsageError(
                f"cannot search {folder} for runs ({error.strerror}): name a folder that holds some"
            ) from None
        yield from _below(str(folder), problems, seen)


def _below(start: str, problems: list[str], seen: set[tuple[int, int]]) -> Iterator[Found]:
    waiting, links = [start], list[str]()
    while waiting or links:
        is_link = not waiting
        path = links.pop() if is_link else waiting.pop()
        try:
            status = os.stat(path)
            with os.scandir(path) as listed:
                entries = list(listed)
        except OSError as error:
            problems.append(f"cannot search {path} for runs ({error.strerror})")
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        files = frozenset(entry.name for entry in entries if _is_file(entry))
        if CONFIG in files:
            yield Found(Path(path), files)
        for entry in entries:
            inside = CONFIG in files and entry.name in WITHOUT_RUNS
            if is_link or inside or entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            elif entry.is_symlink() and os.path.isfile(os.path.join(entry.path, CONFIG)):
                links.append(entry.path)


def _is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:  # such as a link to itself
        return False
