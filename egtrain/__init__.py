"""Train neural networks with very large batches by extrapolation, and measure what it gains."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when asked for: it brings torch, which the command line's --help does without.
    if name == "load_run":
        from egtrain.saved_run import load_run

        return load_run
    raise AttributeError(f"module 'egtrain' has no attribute {name!r}")
