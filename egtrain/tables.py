"""Tables that fit a terminal: titles fold, minor columns are left out, no word is cut."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

GAP = "  "


@dataclass(frozen=True)
class Column:
    """A column of a table, its values from top to bottom."""

    title: str
    values: Sequence[str]
    leave_out: int = 0
    """If space is short, columns with the highest number go first; those with 0 stay."""
    left: bool = False
    """Whether the values are aligned left, like words, and not right, like numbers."""

    @property
    def narrowest(self) -> int:
        """The width that the values and the longest word of the title need."""
        words = [word.rstrip() for word in _words(self.title)]
        return max(map(cell_len, [*words, *self.values]))

    @property
    def widest(self) -> int:
        """The width with the title on one line."""
        return max(self.narrowest, cell_len(self.title))


def print_table(columns: Sequence[Column], console: Console) -> None:
    """Print a table as wide as the terminal; a file or pipe gets all columns."""
    for line in table_lines(columns, console.width if console.is_terminal else None):
        print_line(line, console)


def print_line(text: str, console: Console) -> None:
    """Print a line, folded between words on a terminal, as it is in a file or pipe."""
    console.print(Text(text), soft_wrap=not console.is_terminal)


def table_lines(columns: Sequence[Column], width: int | None) -> list[str]:
    """Return the lines of a table; the last one names the columns left out, if any.

    Args:
        columns: the first says what a row is about; if even the columns with 0 do not fit beside
            it, its values become lines above their rows.
        width: in characters; None for as many as the table takes.
    """
    if width is None or _total(column.widest for column in columns) <= width:
        return _lines(columns, [column.widest for column in columns])
    names, *others = columns
    shown = _that_fit(columns, width)
    lines = _lines(shown, [column.narrowest for column in shown])
    if _total(column.narrowest for column in shown) > width:
        shown = _that_fit(others, width)
        lines = _lines(shown, [column.narrowest for column in shown])
        first = len(lines) - len(names.values)
        for row in reversed(range(len(names.values))):
            if row == 0 or names.values[row] != names.values[row - 1]:
                lines.insert(first + row, names.values[row])
    left_out = [column.title for column in others if column not in shown]
    return [*lines, f"(no room for {', '.join(left_out)})"] if left_out else lines


def _that_fit(columns: Sequence[Column], width: int) -> list[Column]:
    shown = list(columns)
    while _total(column.narrowest for column in shown) > width:
        least = max(shown, key=lambda column: column.leave_out)
        if not least.leave_out:
            break
        shown.remove(least)
    return shown


def _total(widths: Iterable[int]) -> int:
    return sum(width + len(GAP) for width in widths) - len(GAP)


def _lines(columns: Sequence[Column], widths: Sequence[int]) -> list[str]:
    titles = [_folded(column.title, width) for column, width in zip(columns, widths, strict=True)]
    height = max(map(len, titles))
    blocks = []
    for column, title, width in zip(columns, titles, widths, strict=True):
        texts = [*[""] * (height - len(title)), *title, *column.values]
        padding = [" " * (width - cell_len(text)) for text in texts]
        blocks.append(
            [t + p if column.left else p + t for t, p in zip(texts, padding, strict=True)]
        )
    return [GAP.join(cells).rstrip() for cells in zip(*blocks, strict=True)]


def _words(title: str) -> list[str]:
    """Return the parts of a title, split after spaces, hyphens and slashes, but not before a %."""
    return re.findall(r".+?(?:[-/](?=\w)| (?!%)|$)", title) or [""]


def _folded(title: str, width: int) -> list[str]:
    lines = [""]
    for word in _words(title):
        longer = lines[-1] + word
        if cell_len(longer.rstrip()) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line.rstrip() for line in lines]
