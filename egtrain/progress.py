"""Every progress bar: live on a terminal, occasional plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Self, TextIO

from rich import progress as rich_progress
from rich.console import Console, RenderableType
from rich.table import Column
from rich.text import Text

from egtrain.formatting import duration, percent

REFRESHES_PER_SECOND = 4
NAME_WIDTH = 30


class Progress:
    """Bars and lines; a context manager that always restores the terminal.

    If the stream can no longer be written (a closed pipe or terminal), the display ends and the
    work goes on. Characters that the encoding lacks are replaced.

    Args:
        stream: the terminal, file or pipe; standard output if None.
        silent: show nothing, on ranks other than the first.
        seconds_between_lines: the least time between two plain lines of a bar.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        silent: bool = False,
        seconds_between_lines: float = 10.0,
    ) -> None:
        stream = sys.stdout if stream is None else stream
        self.seconds_between_lines = seconds_between_lines
        self._silent = silent
        self._stream = _Stream(stream)
        self._reported: dict[str, Bar] = {}
        console = Console(file=self._stream, highlight=False)  # type: ignore[arg-type]
        self._live: _LiveBars | None = None
        if not silent and _can_redraw(console):
            self._live = _LiveBars(
                rich_progress.TextColumn(
                    "{task.description}",
                    markup=False,
                    table_column=Column(no_wrap=True, overflow="ellipsis", max_width=NAME_WIDTH),
                ),
                rich_progress.BarColumn(None, table_column=Column(ratio=1, min_width=8)),
                *(
                    rich_progress.TextColumn(
                        f"{{task.fields[{name}]}}",
                        markup=False,
                        table_column=Column(no_wrap=True, justify="right"),
                    )
                    for name in ("part", "beside", "left")
                ),
                console=console,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
                expand=True,
                redirect_stdout=stream is not sys.stderr,
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def is_live(self) -> bool:
        """Whether the bars move on a terminal."""
        return self._live is not None

    def bar(
        self, name: str, total: float | None, done: float = 0.0, *, from_now: bool = False
    ) -> "Bar":
        """Add a bar below the others; a context manager that removes it.

        Args:
            name: of the work.
            total: the amount of work, in any unit; None: not known.
            done: how much was done before.
            from_now: estimate the time left from now on, not from the first update.
        """
        return Bar(self, self._live, name, total, done, from_now)

    def report(self, name: str, done: int, total: int) -> None:
        """Show how much of some work is done, in a bar that goes when all of it is."""
        if name not in self._reported:
            self._reported[name] = self.bar(name, total)
        self._reported[name].update(done)
        if done >= total:
            self._reported.pop(name).remove()

    def message(self, text: str) -> None:
        """Print a line, above any bars."""
        if self._silent:
            return
        if self._live is not None:
            self._live.console.print(Text(text))
        else:
            self._stream.write(f"{text}\n")
            self._stream.flush()


class Bar:
    """The progress of one piece of work; made by `Progress.bar`."""

    def __init__(
        self,
        progress: Progress,
        live: "_LiveBars | None",
        name: str,
        total: float | None,
        done: float,
        from_now: bool,
    ) -> None:
        self._progress, self._live = progress, live
        self._name, self._total, self._done = name, total, done
        self._last_line = time.monotonic()
        self._first = (done, self._last_line) if from_now else None
        """Amount and time from which the time left is estimated: those of the first update, since
        what came before was start-up, unless `from_now`."""
        self._seconds_left: float | None = None
        if live is not None:
            self._task = live.add_task(name, total=total, part="", beside="", left="", status="")
            live.update(self._task, completed=done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def update(self, done: float, status: str = "", beside: str = "") -> None:
        """Show how much is done.

        Args:
            done: in the unit of the total.
            status: a line below the bars.
            beside: a few words beside the bar, such as a speed.
        """
        now = time.monotonic()
        self._done = done
        if self._first is None:
            self._first = done, now
        elif self._total is not None and done > self._first[0]:
            pace = (now - self._first[1]) / (done - self._first[0])
            self._seconds_left = pace * max(self._total - done, 0.0)
        left = "" if self._seconds_left is None else f"{duration(self._seconds_left)} left"
        if self._live is not None:
            self._live.update(
                self._task,
                completed=done,
                part=self._part(),
                beside=beside,
                left=left,
                status=status,
            )
        elif now - self._last_line >= self._progress.seconds_between_lines:
            self._last_line = now
            parts = [status or f"{self._name} {self._part()}".rstrip(), beside, left]
            self._progress.message("  ".join(part for part in parts if part))

    def extend(self, total: float) -> None:
        """Take another total amount of work, of which as much is done as before."""
        self._total = total
        if self._live is not None:
            self._live.update(self._task, total=total)

    def watch(self, progress: Callable[[], tuple[float, str]]) -> None:
        """On a terminal, ask for the amount done and a text before each redraw."""
        if self._live is not None:

            def update() -> None:
                done, text = progress()
                self.update(done, beside=text)

            self._live.watched[self._task] = update

    def remove(self) -> None:
        """Take the bar off the terminal."""
        if self._live is not None:
            self._live.watched.pop(self._task, None)
            self._live.remove_task(self._task)

    def _part(self) -> str:
        return percent(self._done / self._total, decimals=0) if self._total else ""


def _can_redraw(console: Console) -> bool:
    """Return whether a console is a real terminal, not a pipe or file forced to act as one."""
    return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal


def show_cursor() -> None:
    """Show the terminal's cursor again, for a process that ends without closing its displays."""
    for stream in (1, 2):
        if os.isatty(stream) and os.environ.get("TERM", "dumb") != "dumb":
            with suppress(OSError):
                os.write(stream, b"\x1b[?25h")


class _LiveBars(rich_progress.Progress):
    """Rich's bars, with the status of each on a line below."""

    def __init__(self, *columns: Any, **options: Any) -> None:
        self.watched: dict[rich_progress.TaskID, Callable[[], None]] = {}
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the table of bars and the lines below it."""
        for update in list(self.watched.values()):
            update()
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if status := task.fields["status"]:
                yield Text(status, no_wrap=True, overflow="ellipsis")


class _Stream:
    """A text stream whose writing never fails."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return self.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError) as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        # The reader is gone: discard everything, including what Python writes at exit. For a lost
        # terminal or a closed stream, silence is enough.
        if isinstance(error, BrokenPipeError):
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
