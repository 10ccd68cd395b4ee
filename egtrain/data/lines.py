"""Lines of a text file; every error names the file and the line."""

import codecs
from pathlib import Path

from egtrain.data.finding import read_file
from egtrain.errors import DataError

LONGEST_LINE = 1_000_000
"""Bytes."""


def read_lines(path: Path) -> list[str]:
    """Return the lines of a user's text file, unpacked if its name ends with .gz.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    lines = lines_of(read_file(path), path)
    if not any(line.strip() for line in lines):
        raise DataError(
            f"{path}: the file is empty; put text into it, one sentence or paragraph per line"
        )
    return lines


def lines_of(content: bytes, path: Path) -> list[str]:
    """Return the lines, without their ends; `path` names the file in messages.

    Only a line feed ends a line, with or without a carriage return before it: Unicode's other
    separators are text. A byte order mark at the beginning is skipped.

    Raises:
        DataError: a line is not UTF-8, or is too long.
    """
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    if not lines[-1]:
        lines.pop()
    decoded = []
    for number, line in enumerate(lines, start=1):
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{path}:{number}: the line has {len(line):,} bytes, and the limit is "
                f"{LONGEST_LINE:,}; break it up"
            )
        try:
            decoded.append(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError as problem:
            raise DataError(
                f"{path}:{number}: the line is not UTF-8 ({problem.reason}); convert the file"
            ) from problem
    return decoded
