"""Gives the process server, which imports this first, a session apart from signals."""

import os
from contextlib import suppress

with suppress(PermissionError):  # it leads its group, and is alone in it
    os.setsid()
