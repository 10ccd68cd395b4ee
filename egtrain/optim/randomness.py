"""Randomness as a function of (seed, purpose, index...): there is no random state to save."""

import hashlib

import torch


def seed_for(seed: int, purpose: str, *index: int) -> int:
    """Return the seed, in [0, 2**63), of one draw; distinct arguments give independent streams.

    `index` numbers the draw, for example by worker and step.
    """
    key = f"{seed}/{purpose}/" + "/".join(map(str, index))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def generator_for(
    seed: int, purpose: str, *index: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a generator on `device` whose seed depends on the other arguments alone."""
    return torch.Generator(device).manual_seed(seed_for(seed, purpose, *index))
