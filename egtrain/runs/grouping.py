"""Runs that differ only in the seed, as one line of a table; the settings in which lines differ."""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from egtrain.config.yaml_text import write_value
from egtrain.over_seeds import deviation_of, mean_of
from egtrain.runs.reading import Measure, Run, State

WITHOUT_EFFECT = re.compile(
    r"seed|threads|(checkpoint|log)\..*|data\.(dir|offline|loaders)|schedule\.shorten_warmup"
)
"""Settings that do not tell what a run computes, the seed aside."""
RATE = ("optimizer.lr", "optimizer.base_batch_size", "optimizer.lr_scaling")
"""What the learning rate of a run is made of."""
SECTIONS = ("extrapolation", "task", "model", "data", "optimizer", "post_local", "schedule")
"""The most telling ones first; the settings that belong to none are last."""


class OverSeeds(NamedTuple):
    """A metric over the seeds of a line."""

    mean: float
    standard_deviation: float | None
    """None for a single seed."""
    seeds: int


@dataclass(frozen=True)
class Line:
    """Runs that differ only in the seed, the one that was started first at the top."""

    runs: tuple[Run, ...]
    name: str

    @property
    def first(self) -> Run:
        """The run that says what all have in common."""
        return self.runs[0]

    @property
    def started(self) -> float:
        """When the last one was started."""
        return self.runs[-1].started

    @property
    def seeds(self) -> list[int]:
        """The different seeds."""
        return sorted({run.seed for run in self.runs if run.seed is not None})

    @property
    def states(self) -> dict[str, int]:
        """How many runs have which state, in the order of `State`."""
        counts = Counter(run.state for run in self.runs)
        return {str(state): counts[state] for state in State if counts[state]}

    @cached_property
    def done(self) -> list[Run]:
        """The runs that count: of each seed the last one that is done."""
        return list({run.seed: run for run in self.runs if run.state is State.done}.values())

    @property
    def metric(self) -> Measure | None:
        """The metric that counts, if a run has come far enough to say so."""
        return next((run.metric for run in reversed(self.runs) if run.metric), None)

    @property
    def step(self) -> int | None:
        """Completed updates of the run that has made the fewest."""
        return min((run.step for run in self.runs if run.step is not None), default=None)

    @property
    def steps(self) -> int | None:
        """Planned updates."""
        return max((run.steps for run in self.runs if run.steps is not None), default=None)

    @property
    def seconds(self) -> float | None:
        """Mean time of the runs that count, or of all."""
        return mean_of([r.seconds for r in self.done or self.runs if r.seconds is not None])

    @property
    def test(self) -> OverSeeds | None:
        """The final test metric of the runs that count."""
        return _over_seeds([run.test for run in self.done])

    @property
    def best(self) -> OverSeeds | None:
        """Their best validation metric."""
        return _over_seeds([run.best for run in self.done])

    def so_far(self, split: str) -> OverSeeds | None:
        """Return the newest evaluations on a split, where no run is done."""
        if self.done:
            return None
        newest = {run.seed: run.newest for run in self.runs if run.newest is not None}
        return _over_seeds([e.value for e in newest.values() if e.split == split])

    @property
    def repeats_a_seed(self) -> bool:
        """Whether a seed is there twice."""
        return len(self.seeds) < len(self.runs) and self.first.seed is not None

    def setting(self, key: str) -> str | None:
        """Return a setting as text; None where there is no such setting."""
        value = self.first.settings.get(key)
        if isinstance(value, str):
            return value
        return write_value(value) if key in self.first.settings else None


def _over_seeds(values: Sequence[float | None]) -> OverSeeds | None:
    known = [value for value in values if value is not None]
    mean = mean_of(known)
    return None if mean is None else OverSeeds(mean, deviation_of(known), len(known))


def grouped(runs: Sequence[Run], *, each: bool) -> list[Line]:
    """Return the lines of runs, the last one started at the end; with `each`, a line for each."""
    groups: dict[object, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.started, run.path)):
        alone = each or run.state in (State.damaged, State.foreign)
        groups.setdefault(run.path if alone else _what_it_computes(run), []).append(run)
    names = Counter(run.path.name for run in runs)
    lines = [Line(tuple(group), _name_of(group, names)) for group in groups.values()]
    return sorted(lines, key=lambda line: line.started)


def _name_of(group: Sequence[Run], all_names: Counter[str]) -> str:
    """Return a name for the runs of a line: `a-s*` for a-s0 and a-s1, if no other begins like that.

    Else it is the name of the first one, and how many others there are; a path, if others have
    that name too.
    """
    own = Counter(run.path.name for run in group)
    first = group[0].path
    if len(group) == 1:
        return first.name if all_names[first.name] == 1 else str(first)
    # Of names, letter by letter, not of paths.
    start = re.sub("[0-9]+$", "", os.path.commonprefix(list(own)))  # noqa: RUF071
    if start and not any(name.startswith(start) for name in all_names - own):
        return f"{start}*"
    name = first.name if all_names[first.name] == own[first.name] else str(first)
    return f"{name} +{len(group) - 1}"


def _what_it_computes(run: Run) -> tuple[object, ...]:
    """Return what runs that differ only in the seed have in common."""
    settings = [
        # Not written as YAML, which takes long.
        (key, repr(value))
        for key, value in run.settings.items()
        # A task file is what its checksum says, wherever it lies.
        if key not in (*RATE, "task.file") and not WITHOUT_EFFECT.fullmatch(key)
    ]
    return run.learning_rate, *sorted(settings)


def differing(lines: Sequence[Line]) -> list[str]:
    """Return the settings in which the lines differ, the most telling ones first."""
    readable = [line for line in lines if line.first.settings]
    keys = dict.fromkeys(key for line in readable for key in line.first.settings)
    found = [
        key
        for key in keys
        if not WITHOUT_EFFECT.fullmatch(key)
        and key != "preset"
        and len({line.setting(key) for line in readable}) > 1
    ]
    return sorted(found, key=_rank)


def telling(lines: Sequence[Line]) -> list[str]:
    """Return those of the differing settings that the other columns do not tell.

    Left out are what makes up batch, rate and steps, and what follows from the preset.
    """

    def follows_from(key: str, *told: Callable[[Line], object]) -> bool:
        values: dict[object, set[str | None]] = {}
        for line in lines:
            if line.first.settings:
                values.setdefault(tuple(f(line) for f in told), set()).add(line.setting(key))
        return all(len(those) == 1 for those in values.values())

    def preset(line: Line) -> str:
        return line.first.preset

    def batch(line: Line) -> object:
        return line.first.batch_size

    return [
        key
        for key in differing(lines)
        if key not in (*RATE, "steps")
        and not follows_from(key, preset)
        and not (key in ("workers", "worker_batch_size") and follows_from(key, preset, batch))
    ]


def _rank(key: str) -> tuple[int, bool]:
    section, _, name = key.rpartition(".")
    return SECTIONS.index(section) if section in SECTIONS else len(SECTIONS), name != "name"
