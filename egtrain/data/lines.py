"""Lines of a text file, plain or gzipped, with every complaint naming the file and the line."""

import gzip
import zlib
from pathlib import Path

from egtrain.errors import DataError

LONGEST_LINE = 1_000_000
"""Bytes."""


def read_text(path: Path) -> bytes:
    """Return what a file holds, unpacked where it ends with .gz.

    Raises `DataError` where it cannot be read, or is empty.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise DataError(
            f"{path}: cannot be read ({reason}); name another folder with --data-dir"
        ) from problem
    if not content.strip():
        raise DataError(
            f"{path}: the file is empty; put text into it, a sentence or paragraph a line"
        )
    return content


def lines_of(content: bytes, path: Path) -> list[str]:
    """Return the lines, without their ends; `path` names the file in messages.

    Only a line feed ends a line, with or without a carriage return before it: Unicode's other
    separators are text. Raises `DataError` for a line that is not UTF-8 or is too long to be one.
    """
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    decoded = []
    for number, line in enumerate(lines, start=1):
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{path}:{number}: a line of {len(line):,} bytes, and {LONGEST_LINE:,} is the "
                "limit; break it up"
            )
        try:
            decoded.append(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError as problem:
            raise DataError(
                f"{path}:{number}: the line is not UTF-8 ({problem.reason}); convert the file"
            ) from problem
    return decoded


def found_folder(name: str, folders: list[Path]) -> Path | None:
    """Return a user's folder: as it is named, or else within the first of `folders` that has it."""
    path = Path(name).expanduser()
    return next(
        (place for place in (path, *(folder / path for folder in folders)) if place.is_dir()), None
    )
