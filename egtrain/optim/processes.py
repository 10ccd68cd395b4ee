"""The processes that train together."""

import torch


def process_count() -> int:
    """Return the number of processes of the default process group, 1 if there is none."""
    # Imported here, since torch may be built without torch.distributed.
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()
