"""Randomness as a function: a draw is seeded by (seed, purpose, index...), so there is no random
state to save.
"""

import hashlib

import torch


def seed_for(seed: int, purpose: str, *index: int) -> int:
    """Return the seed, in [0, 2**63), of one draw; distinct arguments give independent streams.

    `index` is whatever numbers the draw: a worker, a step, an epoch.
    """
    key = f"{seed}/{purpose}/" + "/".join(map(str, index))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def generator_for(
    seed: int, purpose: str, *index: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a generator on `device` that is a function of its arguments alone."""
    return torch.Generator(device).manual_seed(seed_for(seed, purpose, *index))
