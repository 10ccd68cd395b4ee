"""How a learning rate grows with the batch; apart from the schema, which takes long to import."""

import math


def scaled_rate(rate: float, base_batch_size: int | None, scaling: str, batch_size: int) -> float:
    """Return the peak learning rate at a batch of `batch_size` samples.

    Args:
        rate: the rate at a batch of `base_batch_size` samples.
        base_batch_size: without one the rate is used as it is.
        scaling: none, sqrt or linear.
        batch_size: in samples.
    """
    if base_batch_size is None or scaling == "none":
        return rate
    growth = batch_size / base_batch_size
    return rate * (growth if scaling == "linear" else math.sqrt(growth))
