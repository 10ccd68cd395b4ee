"""The processes that carry the workers: how they start, join, stop and end together."""
