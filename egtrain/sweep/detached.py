"""Puts the process that imports it into a session of its own: a signal to the sweep's group must
not end the server.
"""

import os
from contextlib import suppress

with suppress(PermissionError):  # it leads its group, and is alone in it
    os.setsid()
