"""Processes that carry the workers: how they start, meet, stop and end together."""
