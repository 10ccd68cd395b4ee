"""What `egtrain runs` prints: a table for people, JSON or CSV for programs."""

import csv
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, TextIO

from rich.console import Console

from egtrain.formatting import (
    NOTHING,
    count,
    counted,
    duration,
    learning_rate_text,
    mean_text,
)
from egtrain.runs.grouping import Line, OverSeeds, differing, telling
from egtrain.runs.reading import Run
from egtrain.tables import Column, print_line, print_table

MOST_SETTINGS = 6
"""Columns of settings in a table; the others are named below it."""
MOST_CHARACTERS = 16
"""Of a setting in a table."""
MOST_MESSAGES = 10
OTHER_TITLES = {
    *("name", "preset", "batch", "rate", "steps", "state", "seed", "seeds", "metric", "test"),
    *("validation", "time"),
}
"""Titles that no setting has too."""
CSV_COLUMNS = (
    *("name", "directory", "preset", "batch_size", "workers", "worker_batch_size"),
    *("learning_rate", "steps", "planned_steps", "state", "message", "seeds"),
    *("metric", "higher_is_better", "test", "test_standard_deviation", "test_seeds"),
    *("best_validation", "best_validation_standard_deviation", "best_validation_seeds"),
    *("newest_split", "newest", "wall_seconds", "wall_started"),
)
SO_FAR = "*"
"""Marks the newest evaluation of a run that is not done."""


def print_lines(lines: Sequence[Line], console: Console) -> None:
    """Print the table, and what a reader must know."""
    settings = telling(lines)
    shown = settings[:MOST_SETTINGS]
    print_table(_columns(lines, shown), console)
    for note in _notes(lines, settings[MOST_SETTINGS:]):
        print_line(note, console)


def _columns(lines: Sequence[Line], settings: Sequence[str]) -> list[Column]:
    firsts = [line.first for line in lines]
    several = any(len(line.runs) > 1 for line in lines)
    metrics = {line.metric.label for line in lines if line.metric is not None}
    tests = [_result(line, line.test, "test") for line in lines]
    best = [_result(line, line.best, "validation") for line in lines]

    def column(title: str, values: Sequence[str], leave_out: int, left: bool = False) -> Column:
        # What is the same everywhere can be missed most easily.
        same = len(lines) > 1 and len(set(values)) == 1
        return Column(title, values, leave_out=leave_out + 100 * same, left=left)

    presets = [_printable(run.preset) for run in firsts]
    told = all(_printable(line.name).startswith(p) for line, p in zip(lines, presets, strict=True))
    rates = [
        NOTHING if (rate := run.learning_rate) is None else learning_rate_text(rate)
        for run in firsts
    ]
    columns = [
        Column("name", [_printable(line.name) for line in lines], left=True),
        column("preset", presets, 50 if told else 11, left=True),
        column("batch", [count(run.batch_size) for run in firsts], 10),
        column("rate", rates, 12),
    ]
    for place, key in enumerate(settings):
        values = [_short(line.setting(key)) for line in lines]
        columns.append(column(_title(key, settings), values, 9 if place == 0 else 30 + place))
    columns.append(column("steps", [_steps(line) for line in lines], 15))
    columns.append(Column("state", [_state(line) for line in lines], left=True))
    if several:
        columns.append(column("seeds", [count(_seeds(line)) for line in lines], 8))
    else:
        seeds = [NOTHING if run.seed is None else f"{run.seed}" for run in firsts]
        columns.append(column("seed", seeds, 8))
    if len(metrics) > 1:
        names = [NOTHING if line.metric is None else line.metric.label for line in lines]
        columns.append(Column("metric", names, left=True))
    columns.append(Column(f"test {metrics.pop()}" if len(metrics) == 1 else "test", tests))
    if set(best) != {NOTHING}:
        columns.append(column("best validation", best, 14))
    times = [NOTHING if line.seconds is None else duration(line.seconds) for line in lines]
    columns.append(column("time", times, 40))
    return columns


def _title(key: str, settings: Sequence[str]) -> str:
    """Return a setting's title: its last word, where no other one has it."""
    short = _last_word(key)
    others = {*OTHER_TITLES, *(_last_word(other) for other in settings if other != key)}
    return key if short in others else short


def _last_word(key: str) -> str:
    section, _, name = key.rpartition(".")
    return (section if section and name == "name" else name).replace("_", " ")


def _short(setting: str | None) -> str:
    """Return a setting, or the end of a long one, where names and checksums differ most."""
    text = NOTHING if setting is None else _printable(setting)
    return text if len(text) <= MOST_CHARACTERS else f"…{text[1 - MOST_CHARACTERS :]}"


def _result(line: Line, final: OverSeeds | None, split: str) -> str:
    found, mark = (final, "") if final is not None else (line.so_far(split), SO_FAR)
    if found is None or line.metric is None:
        return NOTHING
    return mean_text(found.mean, found.standard_deviation, line.metric.unit) + mark


def _steps(line: Line) -> str:
    if line.step is None or line.steps is None or line.step == line.steps:
        return count(line.step)
    return f"{count(line.step)}/{count(line.steps)}"


def _state(line: Line) -> str:
    states = line.states
    if len(states) == 1:
        return next(iter(states))
    return ", ".join(f"{number} {state}" for state, number in states.items())


def _seeds(line: Line) -> int | None:
    """Return the number of seeds that a result is over; of all seeds where there is no result."""
    result = line.test or line.best or line.so_far("test") or line.so_far("validation")
    return len(line.seeds) or None if result is None else result.seeds


def _notes(lines: Sequence[Line], left_out: Sequence[str]) -> list[str]:
    notes = []
    if left_out:
        notes.append(f"They differ in these settings too (see --csv): {', '.join(left_out)}.")
    results = [
        (line, result)
        for line in lines
        for result in (line.test, line.best, line.so_far("test"), line.so_far("validation"))
        if result is not None
    ]
    if any(not line.done for line, _ in results):
        notes.append(f"{SO_FAR} The newest evaluation of runs that are not done.")
    if spread := {r.seeds for _, r in results if r.standard_deviation is not None}:
        seeds = f"{spread.pop()}" if len(spread) == 1 else "the"
        notes.append(f"After ±: the standard deviation over {seeds} seeds.")
    if any(line.repeats_a_seed for line in lines):
        notes.append("Of runs with equal seeds only the last one that is done counts.")
    messages = [
        f"{_printable(run.path.name)}: {run.state}: {_printable(run.message)}"
        for line in lines
        for run in line.runs
        if run.message
    ]
    if len(messages) > MOST_MESSAGES:
        more = counted(len(messages) - MOST_MESSAGES, "more message")
        messages = [*messages[:MOST_MESSAGES], f"{more}: see --json"]
    return notes + messages


def _printable(text: str) -> str:
    """Return a text from a file without what a terminal obeys."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def as_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Return an object for each line, in fractions, nats, samples and seconds."""
    settings = differing(lines)
    return [
        {
            **_facts(line),
            "states": line.states,
            "seeds": line.seeds,
            "metric": None if line.metric is None else line.metric._asdict(),
            "test": None if line.test is None else line.test._asdict(),
            "best_validation": None if line.best is None else line.best._asdict(),
            "settings": {key: line.first.settings.get(key) for key in settings},
            "wall": {"seconds": line.seconds, "started": _time(line.started)},
            "runs": [_run_as_json(run) for run in line.runs],
        }
        for line in lines
    ]


def _facts(line: Line) -> dict[str, Any]:
    first = line.first
    return {
        "name": line.name,
        "preset": first.preset,
        "batch_size": first.batch_size,
        "workers": first.settings.get("workers"),
        "worker_batch_size": first.settings.get("worker_batch_size"),
        "learning_rate": first.learning_rate,
        "steps": line.step,
        "planned_steps": line.steps,
    }


def _run_as_json(run: Run) -> dict[str, Any]:
    return {
        "directory": str(run.path),
        "seed": run.seed,
        "state": str(run.state),
        "message": run.message,
        "steps": run.step,
        "planned_steps": run.steps,
        "final": run.final,
        "best_validation": run.best,
        "newest": None if run.newest is None else run.newest._asdict(),
        "wall": {"seconds": run.seconds, "started": _time(run.started)},
    }


def write_csv(lines: Sequence[Line], file: TextIO) -> None:
    """Write a row for each line, with every setting in which they differ."""
    settings = [key for key in differing(lines) if key not in ("workers", "worker_batch_size")]
    writer = csv.writer(file, lineterminator="\n")
    records = [_record(line) for line in lines]
    writer.writerow([*CSV_COLUMNS, *settings])
    for line, record in zip(lines, records, strict=True):
        values = [line.setting(key) for key in settings]
        writer.writerow([*(record[name] for name in CSV_COLUMNS), *values])


def _record(line: Line) -> dict[str, Any]:
    metric, newest = line.metric, line.runs[-1].newest if len(line.runs) == 1 else None
    record = {
        **_facts(line),
        "directory": os.pathsep.join(str(run.path) for run in line.runs),
        "state": _state(line),
        "message": "; ".join(run.message for run in line.runs if run.message),
        "seeds": " ".join(map(str, line.seeds)),
        "metric": None if metric is None else metric.name,
        "higher_is_better": None if metric is None else metric.higher_is_better,
        "newest_split": None if newest is None else newest.split,
        "newest": None if newest is None else newest.value,
        "wall_seconds": line.seconds,
        "wall_started": _time(line.started),
    }
    for name, result in (("test", line.test), ("best_validation", line.best)):
        record[name] = None if result is None else result.mean
        record[f"{name}_standard_deviation"] = None if result is None else result.standard_deviation
        record[f"{name}_seeds"] = None if result is None else result.seeds
    return record


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
