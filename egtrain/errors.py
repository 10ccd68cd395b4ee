"""What a user can do wrong, or what can happen to a run, each with its exit code."""

import difflib


class EgtrainError(Exception):
    """A failure that is reported in one line, without a traceback; the message names the fix."""

    exit_code = 1
    reported_by: int | None = None
    """The rank that reports an error which all ranks raise; None: the one that raises it."""


class UsageError(EgtrainError):
    """A wrong option, configuration or combination of them."""

    exit_code = 2


class DataError(EgtrainError):
    """A file that is missing, damaged or of the wrong shape."""

    exit_code = 3


class NotDownloaded(DataError):
    """A public data set that is not on this machine, where a download is not allowed."""


class MissingExtra(UsageError):
    """A package is missing that an extra of egtrain installs."""


class DivergedError(EgtrainError):
    """The loss became infinite or not a number."""

    exit_code = 4
    reported_by = 0


class InterruptedRun(EgtrainError):
    """A signal ended the run after a checkpoint was saved; it can be resumed."""

    exit_code = 75
    reported_by = 0


def did_you_mean(word: str, known: list[str]) -> str:
    """Return a hint at the nearest valid name, to end a message; empty if none is near."""
    # Matching takes quadratic time, and nobody mistypes a long text.
    if len(word) > 100:
        return ""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
