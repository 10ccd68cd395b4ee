"""Batch-size sweeps: their `plan`, its `execution`, its `results` and their `picture`."""
