"""What a run leaves to read: metrics.jsonl, TensorBoard events and the summary; each step once,
even if resumed.
"""

import json
import math
import os
import platform
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy
import torch

from egtrain import __version__
from egtrain.checkpoint import write_atomically
from egtrain.errors import EgtrainError
from egtrain.training_display import TrainingDisplay

TAGS = {
    "learning_rate": "schedule/learning_rate",
    "gradient_norm": "gradient/norm",
    "local_gradient_norm": "gradient/local_norm",
    "noise_scale": "gradient/noise_scale",
    "gradient_alignment": "extrapolation/alignment",
    "extrapolation_size": "extrapolation/relative_size",
    "synchronisations": "post_local/synchronisations",
    "samples_per_second": "speed/samples_per_second",
}
"""TensorBoard's name of a training metric; one that is not here is `train/<name>`."""

SMOOTHED_STEPS = 20


class RunLog:
    """Writes the metrics of a run to metrics.jsonl and, if wanted, TensorBoard events, and shows
    them.

    A file that cannot be written during the run is warned of once; its records wait in memory for
    room on the disk.

    Args:
        directory: of the run; it exists.
        tensorboard: whether to write events.
        resume_step: the run goes on after this step, and what was logged of later ones is cut off;
            0 or None: from the start, and everything is.
        every: write the training metrics of each so-many-th step.
        display: is told of every step.
        warn: takes a warning in one line; by default the display, or standard error.

    Raises:
        EgtrainError: the files cannot be opened.
    """

    def __init__(
        self,
        directory: Path,
        *,
        tensorboard: bool = True,
        resume_step: int | None = None,
        every: int = 1,
        display: TrainingDisplay | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._display = display
        self._warn = warn or self._show_warning
        self._every = every
        self._step = resume_step or 0
        self._speed = _Speed()
        metrics = directory / "metrics.jsonl"
        try:
            seconds = _cut_lines_after(metrics, self._step)
            self._lines = _GrowingFile(metrics, self._warn)
            self._events = (
                _Events(directory / "tensorboard", self._step, self._warn) if tensorboard else None
            )
        except OSError as error:
            raise EgtrainError(
                f"cannot write {error.filename or directory}: {error.strerror}: "
                "free some space or make the folder writable, and start again"
            ) from error
        self._zero_time = time.monotonic() - seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def train_step(
        self, step: int, epoch: float, metrics: Mapping[str, float], samples: int
    ) -> None:
        """Take the metrics of a completed update that `samples` samples went into."""
        self._step = step
        speed = self._speed.after_step(samples)
        if self._display is not None:
            self._display.step(step, epoch, metrics, speed)
        if step % self._every:
            return
        self._write_line(step, epoch, "train", metrics, {"samples_per_second": speed})
        if self._events is not None:
            values = dict(metrics) if speed is None else {**metrics, "samples_per_second": speed}
            self._events.scalars(
                {TAGS.get(name, f"train/{name}"): value for name, value in values.items()}, step
            )

    def evaluation(self, step: int, epoch: float, split: str, metrics: Mapping[str, float]) -> None:
        """Take the metrics of an evaluation after `step` updates."""
        self._step = step
        if self._display is not None:
            self._display.evaluation(step, epoch, split, metrics)
        self._write_line(step, epoch, split, metrics, {})
        if self._events is not None:
            self._events.scalars(
                {f"{split}/{name}": value for name, value in metrics.items()}, step
            )
        self._speed.restart_clock()

    def text(self, tag: str, text: str) -> None:
        """Put a text into TensorBoard, in Markdown; a resumed run, which has it already, keeps
        that.
        """
        if self._events is not None:
            self._events.text(tag, text, self._step)

    def hyperparameters(
        self, values: Mapping[str, object], final_metrics: Mapping[str, float]
    ) -> None:
        """Put the run into TensorBoard's table of hyperparameters; to be called at its end.

        Args:
            values: flat; None is left out.
            final_metrics: shown in the table as `final/<name>`.
        """
        if self._events is not None:
            self._events.hyperparameters(values, final_metrics, self._step)

    def restart_clock(self) -> None:
        """Say that the time since the last step did not go into training, but for example into a
        checkpoint.
        """
        self._speed.restart_clock()

    def flush(self) -> None:
        """Bring everything to the disk; to be called before a checkpoint, which must never be ahead
        of the log.
        """
        self._lines.sync()
        if self._events is not None:
            self._events.file.sync()
        self._speed.restart_clock()

    def close(self) -> None:
        """Bring everything to the disk and end the files."""
        self._lines.close()
        if self._events is not None:
            self._events.file.close()

    def _write_line(
        self,
        step: int,
        epoch: float,
        split: str,
        metrics: Mapping[str, float],
        wall: Mapping[str, float | None],
    ) -> None:
        wall = {"seconds": round(time.monotonic() - self._zero_time, 3), **wall}
        line = {"step": step, "epoch": epoch, "split": split, **metrics, "wall": wall}
        self._lines.write(json.dumps(finite(line), allow_nan=False).encode() + b"\n")

    def _show_warning(self, message: str) -> None:
        if self._display is not None:
            self._display.message(f"warning: {message}")
        else:
            print(f"warning: {message}", file=sys.stderr)


class _Speed:
    """Samples per second over the last steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=SMOOTHED_STEPS)
        self._since: float | None = None

    def after_step(self, samples: int) -> float | None:
        """Return the speed, now that a step has ended; None until one was timed (the first holds
        the start-up).
        """
        now = time.monotonic()
        if self._since is not None:
            self._steps.append((samples, now - self._since))
        self._since = now
        seconds = sum(seconds for _, seconds in self._steps)
        return (
            round(sum(samples for samples, _ in self._steps) / seconds, 1) if seconds > 0 else None
        )

    def restart_clock(self) -> None:
        if self._since is not None:
            self._since = time.monotonic()


class _GrowingFile:
    """A file of records that only grows. What the disk does not take waits in memory, so no record
    is lost or torn.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path = path
        self._warn = warn
        self._warned = False
        self._waiting = bytearray()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, data: bytes) -> None:
        self._waiting += data
        try:
            while self._waiting:
                written = os.write(self._file, self._waiting)
                del self._waiting[:written]
        except OSError as error:
            self._report(error)

    def sync(self) -> None:
        self.write(b"")
        try:
            os.fsync(self._file)
        except OSError as error:
            self._report(error)

    def close(self) -> None:
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1

    def _report(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            self._warn(
                f"cannot write {self._path} ({error.strerror}); training goes on, and it is tried "
                "again"
            )


class _Events:
    """TensorBoard's event files of a run, in one folder: a file for each process, in the order of
    their names.

    Written directly and not by `SummaryWriter`: its thread ends with a traceback when the disk is
    full, it cannot sync, and it names the two files of a quick restart in no certain order.
    """

    def __init__(self, folder: Path, resume_step: int, warn: Callable[[str], None]) -> None:
        # Slow to import, and not everyone wants the events.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._session_log, self._summary = (
            event_pb2.Event,
            event_pb2.SessionLog,
            summary_pb2.Summary,
        )
        self._trial = os.fsencode(folder.parent.resolve().name).decode(errors="replace")
        self.described: dict[str, int] = {}
        """The step that each tag other than a curve was last written at, with those that earlier
        files keep."""
        folder.mkdir(exist_ok=True)
        earlier = sorted(folder.glob("events.out.tfevents.*"))
        numbers = [path.name.split(".")[3] for path in earlier]
        for path in earlier:
            if resume_step:
                self._cut_after(path, resume_step)
            else:
                path.unlink()
        # Readers go by the names: the number is the time, unless an earlier file has that or a
        # later one.
        number = max(
            int(time.time()), *(int(number) + 1 for number in numbers if number.isdigit()), 0
        )
        self.file = _GrowingFile(folder / f"events.out.tfevents.{number:010d}.egtrain", warn)
        self._records = RecordWriter(self.file)
        self._add(self._event(file_version="brain.Event:2"))
        if resume_step:
            # For a TensorBoard that is running and has read what was cut off.
            restart = self._session_log(status=self._session_log.START)
            self._add(self._event(step=resume_step + 1, session_log=restart))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write the values of a step, by tag."""
        summary = self._summary()
        for tag, value in values.items():
            summary.value.add(tag=tag, simple_value=value)
        self._add(self._event(step=step, summary=summary))

    def text(self, tag: str, text: str, step: int) -> None:
        """Write a text, unless the tag has one."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        if tag not in self.described:
            self._describe(text_pb(tag, text), step)

    def hyperparameters(
        self, values: Mapping[str, object], final_metrics: Mapping[str, float], step: int
    ) -> None:
        """Write what the run's row in the table of hyperparameters shows, unless this step has
        that.

        There is no experiment record: of several runs TensorBoard shows only the columns that the
        first one names, and without any it finds the columns of all by itself.
        """
        from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        if self.described.get(SESSION_START_INFO_TAG) == step:
            return
        self.scalars({f"final/{name}": value for name, value in final_metrics.items()}, step)
        plain = {
            name: value if isinstance(value, bool | int | float) else str(value)
            for name, value in values.items()
            if value is not None
        }
        self._describe(hparams_pb(plain, trial_id=self._trial), step)

    def _describe(self, summary: Any, step: int) -> None:
        # Where TensorFlow is installed, TensorBoard's helpers return its class of summaries.
        summary = self._summary.FromString(summary.SerializeToString())
        self.described |= {value.tag: step for value in summary.value}
        self._add(self._event(step=step, summary=summary))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def _cut_after(self, path: Path, step: int) -> None:
        """Cut an earlier file before its first event of a later step, or its first torn one."""
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

        data = path.read_bytes()
        kept = 0
        # A record is its length (8 bytes), a checksum of that (4), an event, and a checksum of the
        # event (4).
        while kept + 16 <= len(data):
            length, checksum = struct.unpack_from("<QI", data, kept)
            end = kept + 16 + length
            if end > len(data) or checksum != masked_crc32c(data[kept : kept + 8]):
                break
            try:
                event = self._event.FromString(data[kept + 12 : end - 4])
            except Exception:  # protobuf's DecodeError, from a package without types
                break
            if event.step > step:
                break
            self.described |= {
                value.tag: event.step for value in event.summary.value if value.HasField("metadata")
            }
            kept = end
        if kept < len(data):
            os.truncate(path, kept)


def _cut_lines_after(path: Path, step: int) -> float:
    """Cut off the lines of later steps, and torn ones; return the seconds that the last one left
    has on its clock.
    """
    if not path.exists():
        return 0.0
    if not step:
        os.truncate(path, 0)
        return 0.0
    size = path.stat().st_size
    kept: list[bytes] = []
    seconds = 0.0
    with path.open("rb") as file:
        for line in file:
            try:
                values = json.loads(line)
                late, now = values["step"] > step, float(values["wall"]["seconds"])
            except (ValueError, KeyError, TypeError):
                continue
            if not late:
                kept.append(line.rstrip(b"\n") + b"\n")
                seconds = now
    if sum(map(len, kept)) != size:
        write_atomically(path, b"".join(kept))
    return seconds


def finite(value: Any) -> Any:
    """Return a nested value with None for every number that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json, atomically.

    Raises:
        EgtrainError: it could not be written.
    """
    write_atomically(path, (json.dumps(finite(summary), indent=2, allow_nan=False) + "\n").encode())


def versions() -> dict[str, str | None]:
    """Return the versions of what the numbers of a run depend on."""
    return {
        "egtrain": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
    }


def hardware() -> dict[str, Any]:
    """Return the processor's name, the cores that this process may use, and the names of the
    GPUs.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
    }


def git_commit() -> str | None:
    """Return the commit of the working directory; None outside a repository, or where git takes
    over a second.
    """
    return _output_of("git", "rev-parse", "--verify", "HEAD")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        next(iter(names), None)
        or _output_of("sysctl", "-n", "machdep.cpu.brand_string")
        or platform.machine()
    )


def _output_of(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=1, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
