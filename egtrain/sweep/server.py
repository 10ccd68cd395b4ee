"""Imported first by the process server: puts it in a new session, away from signals."""

import os
from contextlib import suppress

with suppress(PermissionError):  # it leads its process group already, and is alone in it
    os.setsid()
