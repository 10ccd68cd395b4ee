"""Gives the server of processes, which imports this first, a session: a signal to the sweep's group
must not end it.
"""

import os
from contextlib import suppress

with suppress(PermissionError):  # it leads its group, and is alone in it
    os.setsid()
