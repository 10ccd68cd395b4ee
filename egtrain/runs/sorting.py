"""The order of the lines of a table of runs."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from egtrain.errors import UsageError, did_you_mean
from egtrain.runs.grouping import Line, OverSeeds
from egtrain.runs.reading import State

Key = Callable[[Line], Any]
"""What comes first is smallest; None is last."""


def in_order(lines: Sequence[Line], name: str) -> list[Line]:
    """Return the lines sorted by a column, a metric on the test split, or a setting.

    Of metrics the best comes first, of everything else the smallest; what is missing is last, and
    equal ones stay in their order.

    Raises:
        UsageError: there is nothing of that name.
    """
    settings = {key: None for line in lines for key in line.first.settings}
    metrics = {line.metric.name: None for line in lines if line.metric is not None}
    if name in COLUMNS:
        key = COLUMNS[name]
    elif name in metrics:
        key = _by_metric(name)
    elif name in settings:
        key = _by_setting(name)
    else:
        hint = did_you_mean(name, [*COLUMNS, *metrics, *settings])
        hint = hint or f"; there are {', '.join(COLUMNS)}, and settings"
        raise UsageError(f"--sort {name}: there is no such column{hint}")
    values = [key(line) for line in lines]
    places = sorted(
        range(len(lines)), key=lambda i: (values[i] is None, 0 if values[i] is None else values[i])
    )
    return [lines[place] for place in places]


def _natural(text: str) -> list[tuple[bool, Any]]:
    """Return a key that puts `b64` before `b128`."""
    parts = re.split(r"([0-9]+)", text)
    return [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in parts if part]


def _merit(line: Line, value: OverSeeds | None) -> tuple[str, float] | None:
    """Return a key that puts the best first; metrics of several kinds do not mix."""
    if line.metric is None or value is None:
        return None
    return line.metric.name, -value.mean if line.metric.higher_is_better else value.mean


def _test(line: Line) -> tuple[str, float] | None:
    return _merit(line, line.test or line.so_far("test"))


def _by_metric(name: str) -> Key:
    return lambda line: _test(line) if line.metric and line.metric.name == name else None


def _by_setting(name: str) -> Key:
    def key(line: Line) -> tuple[bool, Any] | None:
        value = line.first.settings.get(name)
        if value is None:
            return None
        is_number = isinstance(value, int | float)
        return not is_number, value if is_number else _natural(str(value))

    return key


COLUMNS: dict[str, Key] = {
    "started": lambda line: line.started,
    "name": lambda line: _natural(line.name),
    "preset": lambda line: _natural(line.first.preset),
    "batch": lambda line: line.first.batch_size,
    "rate": lambda line: line.first.learning_rate,
    "steps": lambda line: line.step,
    "state": lambda line: [list(State).index(State(state)) for state in line.states],
    "seed": lambda line: line.first.seed,
    "seeds": lambda line: len(line.seeds),
    "test": _test,
    "validation": lambda line: _merit(line, line.best or line.so_far("validation")),
    "time": lambda line: line.seconds,
}
