"""A run read from the files that it has left, in a fraction of a millisecond.

Nothing here imports torch, and a configuration is data: it is not checked against the schema, which
would take longer than everything else.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

from egtrain.config.rate_scaling import scaled_rate
from egtrain.config.yaml_text import read_written_settings
from egtrain.errors import DivergedError, UsageError
from egtrain.run_directory import CONFIG, FAILURE, METRICS, PLAN, SUMMARY, is_held
from egtrain.runs.finding import Found

MAX_BYTES = 10_000_000
"""Of a JSON file, and of a line of metrics.jsonl."""
_BLOCK = 1 << 14


class State(StrEnum):
    """How far a run has come."""

    running = "running"
    """A process holds its directory."""
    done = "done"
    interrupted = "interrupted"
    """No process holds it, and it can be resumed."""
    diverged = "diverged"
    failed = "failed"
    damaged = "damaged"
    """One of its files cannot be read."""
    foreign = "foreign"
    """Another program's config.yaml."""


class Measure(NamedTuple):
    """The metric that counts."""

    name: str
    unit: str
    higher_is_better: bool

    @property
    def label(self) -> str:
        """The name, for people."""
        return self.name.replace("_", " ")


class Evaluation(NamedTuple):
    """The metric that counts, during a run."""

    split: str
    step: int
    value: float


@dataclass(frozen=True)
class Run:
    """A run, or a folder that looks like one."""

    path: Path
    state: State
    started: float
    """When it was started, or resumed last, in seconds since 1970."""
    message: str = ""
    """Why it has this state, where that is not plain."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """By dotted keys; empty where they cannot be read."""
    learning_rate: float | None = None
    """At its peak, scaled to the batch size."""
    step: int | None = None
    """Completed updates."""
    steps: int | None = None
    """Planned updates."""
    metric: Measure | None = None
    final: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Metrics of each held-out split at the end; empty before."""
    best: float | None = None
    """The best metric on the validation split; None before the end."""
    newest: Evaluation | None = None
    """The last evaluation of a run that is not at its end."""
    seconds: float | None = None
    """Time of the run so far, without the starts of its processes."""

    @property
    def seed(self) -> int | None:
        """The seed."""
        return self.settings.get("seed")

    @property
    def preset(self) -> str:
        """The preset's name."""
        return str(self.settings.get("preset", ""))

    @property
    def batch_size(self) -> int | None:
        """B = K·b."""
        if not self.settings:
            return None
        workers: int = self.settings["workers"]
        return workers * int(self.settings["worker_batch_size"])

    @property
    def test(self) -> float | None:
        """The metric on the test split at the end."""
        return None if self.metric is None else self.final.get("test", {}).get(self.metric.name)


class _DamagedError(Exception):
    """A file is not what a run writes; the message says which, and why."""


class _ForeignError(Exception):
    """A config.yaml is not one of a run."""


def read_run(found: Found) -> Run | None:
    """Return what a folder's files say; None if they are gone by now."""
    try:
        started = (found.path / CONFIG).stat().st_mtime
    except OSError:
        return None
    known: dict[str, Any] = {}
    try:
        known["settings"] = settings = _settings(found.path)
        known["learning_rate"] = _peak_rate(settings)
        known |= _progress(found)
        state, message = known.pop("state"), known.pop("message")
    except _ForeignError as error:
        state, message = State.foreign, str(error)
    except _DamagedError as error:
        state, message = State.damaged, str(error)
    return Run(found.path, state, started, message, **known)


def _settings(path: Path) -> dict[str, Any]:
    """Return the settings of a run's config.yaml by dotted keys."""
    try:
        written = read_written_settings(path / CONFIG, CONFIG)
    except UsageError as error:
        raise _DamagedError(str(error)) from None
    settings: dict[str, Any] = {}
    for name, value in written.items():
        if isinstance(value, dict):
            settings |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            settings[name] = value
    for key, least in (("seed", 0), ("workers", 1), ("worker_batch_size", 1), ("optimizer.lr", 0)):
        if key not in settings:
            raise _ForeignError(f"{CONFIG} is not one of egtrain's, which have {key}")
        value = settings[key]
        if not _is_number(value) or value < least:
            raise _DamagedError(f"{CONFIG}: {key} is not a number of at least {least}")
        if key != "optimizer.lr" and not isinstance(value, int):
            raise _DamagedError(f"{CONFIG}: {key} is not a whole number")
    return settings


def _peak_rate(settings: Mapping[str, Any]) -> float:
    base = settings.get("optimizer.base_batch_size")
    scaling = settings.get("optimizer.lr_scaling", "none")
    batch_size = settings["workers"] * settings["worker_batch_size"]
    try:
        rate = scaled_rate(settings["optimizer.lr"], base, scaling, batch_size)
        if math.isfinite(rate):
            return rate
    except (TypeError, ValueError, ArithmeticError):
        pass
    raise _DamagedError(f"{CONFIG}: the learning rate is not a number")


def _progress(found: Found) -> dict[str, Any]:
    """Return a run's state, message, steps and results, by their names in `Run`."""
    plan, summary, failure = (_json_object(found, name) for name in (PLAN, SUMMARY, FAILURE))
    steps = _whole(plan.get("steps"))
    ended = _whole(summary.get("steps"))
    metric = _measure((plan or summary).get("metric"))
    held = is_held(found.path)
    over = ended is not None and ended >= (steps or 0) and not held
    last, newest = _last_lines(found, None if over else metric)
    progress: dict[str, Any] = {
        "steps": ended if steps is None else steps,
        "step": ended if over else _whole(last.get("step")) or 0,
        "seconds": _number(_mapping(last.get("wall")).get("seconds")),
        "metric": metric,
        "newest": newest,
        "message": str(failure.get("message", "")),
    }
    if held:
        return progress | {"state": State.running, "message": ""}
    if failure:
        diverged = failure.get("exit_code") == DivergedError.exit_code
        return progress | {"state": State.diverged if diverged else State.failed}
    if not over:
        return progress | {"state": State.interrupted}
    final = {
        split: {name: _number(value) for name, value in _mapping(metrics).items()}
        for split, metrics in _mapping(summary.get("final")).items()
    }
    best = _mapping(_mapping(summary.get("best")).get("validation"))
    progress |= {"final": final, "best": None if metric is None else _number(best.get(metric.name))}
    if any(value is None for metrics in final.values() for value in metrics.values()):
        return progress | {"state": State.diverged, "message": "a final metric is not a number"}
    return progress | {"state": State.done}


def _json_object(found: Found, name: str) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if there is no file."""
    if name not in found.files:
        return {}
    try:
        with (found.path / name).open("rb") as file:
            value = json.loads(file.read(MAX_BYTES))
    except FileNotFoundError:  # by now
        return {}
    except OSError as error:
        raise _DamagedError(f"{name} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise _DamagedError(f"{name} is not JSON") from None
    if not isinstance(value, dict):
        raise _DamagedError(f"{name} is not a JSON object")
    return value


def _last_lines(found: Found, metric: Measure | None) -> tuple[dict[str, Any], Evaluation | None]:
    """Return the last line of metrics.jsonl, and the last evaluation of a metric, if one is given.

    What is still being written at the end of the file is left out.
    """
    if METRICS not in found.files:
        return {}, None
    last: dict[str, Any] = {}
    try:
        with (found.path / METRICS).open("rb") as file:
            for text in _lines_from_end(file):
                if last and b'"split": "train"' in text:
                    continue
                line = json.loads(text)
                split, step = line["split"], _whole(line["step"])
                last = last or line
                if metric is None:
                    break
                if split != "train":
                    value = _number(line[metric.name])
                    if value is None or step is None:
                        break
                    return last, Evaluation(str(split), step, value)
    except FileNotFoundError:  # by now
        return {}, None
    except OSError as error:
        raise _DamagedError(f"{METRICS} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _DamagedError(f"{METRICS} has a line that no run writes") from None
    return last, None


def _lines_from_end(file: BinaryIO) -> Iterator[bytes]:
    """Yield the complete lines of a file, the last one first."""
    start, rest, is_torn = file.seek(0, os.SEEK_END), b"", True
    while start:
        end, start = start, max(0, start - _BLOCK)
        file.seek(start)
        text = file.read(end - start) + rest
        rest, newline, complete = text.partition(b"\n") if start else (b"", b"\n", text)
        if not newline:
            rest = text
            if len(rest) > MAX_BYTES:
                raise ValueError("a line without end")
            continue
        lines = complete.split(b"\n")
        if is_torn:
            lines.pop()
            is_torn = False
        yield from reversed(lines)


def _mapping(value: object) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _DamagedError(f"{PLAN}, {SUMMARY} or {METRICS} is not what a run writes")
    return value


def _number(value: object) -> float | None:
    """Return a finite number; None for null, which stands for the others."""
    if value is None:
        return None
    if not _is_number(value):
        raise _DamagedError(f"{SUMMARY} or {METRICS} has a text in the place of a number")
    return float(value)


def _whole(value: object) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _measure(value: object) -> Measure | None:
    """Return the metric that counts; None for the summary of a run that was told of none."""
    given = _mapping(value)
    name, unit, higher = (given.get(key) for key in Measure._fields)
    if name is None:
        return None
    if isinstance(name, str) and isinstance(unit, str) and isinstance(higher, bool):
        return Measure(name, unit, higher)
    raise _DamagedError(f"{PLAN} or {SUMMARY} says nothing of what counts")


def _is_number(value: object) -> TypeGuard[int | float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300  # neither infinite nor beyond what can be computed with
