"""Learning-rate schedules: plain functions of the step."""

import math
from collections.abc import Callable, Sequence

Schedule = Callable[[int], float]
"""Returns the learning rate of the update after `step` completed ones."""


def with_warmup(schedule: Schedule, steps: int, start: float) -> Schedule:
    """Return `schedule` with a linear warm-up over the first `steps` updates (arXiv 1706.02677).

    The warm-up goes from `start` to the schedule's rate; a start above that rate is lowered to it.
    """

    def rate(step: int) -> float:
        if step >= steps:
            return schedule(step)
        peak = schedule(steps)
        low = min(start, peak)
        return low + (peak - low) * step / steps

    return rate


def step_decay(peak: float, milestones: Sequence[int], factor: float) -> Schedule:
    """Return peak·factor^(number of milestones reached); milestones are steps."""
    return lambda step: peak * factor ** sum(step >= milestone for milestone in milestones)


def cosine_decay(peak: float, first: int, last: int) -> Schedule:
    """Return a half cosine, `peak` at step `first` and zero at `last` (arXiv 1608.03983)."""

    def rate(step: int) -> float:
        done = min(max((step - first) / max(last - first, 1), 0.0), 1.0)
        return peak * 0.5 * (1 + math.cos(math.pi * done))

    return rate


def inverse_sqrt(peak: float, first: int) -> Schedule:
    """Return `peak` up to step `first`, then peak·√(first/step) (arXiv 1706.03762)."""
    start = max(first, 1)
    return lambda step: peak * math.sqrt(start / max(step, start))


def constant(peak: float) -> Schedule:
    """Return the same rate at every step."""
    return lambda step: peak
