"""What the subcommands do while they import torch, which takes seconds."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ending_at_interrupt() -> Iterator[None]:
    """End the process at Ctrl-C: while torch or NumPy is imported, an exception can get lost."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
