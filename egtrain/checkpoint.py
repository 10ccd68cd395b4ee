"""Checkpoints that outlive kills, full disks and damaged files: written atomically, verified.

A checkpoint file is what `torch.save` writes, followed by its SHA-256 (32 bytes) and `MAGIC`. So
a copy can be verified anywhere, and `torch.load(path, weights_only=True)` can read it.
`index.json` lists the valid files in the order of their steps; other files are ignored.
"""

import hashlib
import json
import math
import os
import pickle
import re
import signal
import sys
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, Self, cast

import torch
from torch import Tensor

from egtrain.disk import cannot_write, replacing, write_atomically
from egtrain.errors import DataError, UsageError

FORMAT = 2
"""Version of the layout; files of other versions are refused."""
MAGIC = b"egtrain\n"
"""The last bytes of every checkpoint file."""
INDEX = "index.json"
FAULT_VARIABLE = "EGTRAIN_TEST_FAULT"
"""Environment variable, for tests only: see `_kill_at`."""

_TRAILER = hashlib.sha256().digest_size + len(MAGIC)
_CHUNK = 1 << 20
_FILE_NAME = re.compile(r"step-(\d{8,})\.pt")


class _DamagedFile(DataError):
    """A file whose bytes are not those that were written."""


class CheckpointStore:
    """The checkpoints of one run, in one folder; one process writes it, any number read it.

    It keeps the last two, the best (if a metric is given) and the final one, or all of them with
    `keep="all"`.

    Args:
        directory: made by the first save.
        keep: which are kept.
        higher_is_better: of the metric; whoever only reads takes it from the index.
        warn: is told of damaged files; by default they are printed.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: Literal["last", "all"] = "last",
        higher_is_better: bool | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.directory = directory
        self._keep = keep
        self._higher_is_better = higher_is_better
        self._warn = warn or _warn_on_stderr
        self._saves = 0

    def save(
        self, state: dict[str, Any], step: int, *, metric: float | None = None, final: bool = False
    ) -> Path:
        """Write a step's checkpoint and return its path; if killed, earlier ones stay intact.

        Checkpoints of later steps leave the index: the run has been restarted before them.

        Args:
            state: nested dicts, lists and tuples of tensors and plain values.
            step: completed updates.
            metric: decides which is `best`; with None or a non-finite value this one cannot be.
            final: whether it ends the run.

        Raises:
            EgtrainError: it could not be written, for example because the disk is full.
            TypeError: the state holds something that cannot be loaded again.
        """
        self._saves += 1
        kill_at = partial(_kill_at, save=self._saves)
        if self._saves == 1:
            self._remove_leftovers()
        path = self.file_of(step)
        content = {"format": FORMAT, "step": step, "state": _portable(state, "state")}
        kill_at("save-before-write")
        with replacing(path, kill_at) as file:
            _write(content, file, kill_at)
        kill_at("save-before-index")
        if metric is not None and not math.isfinite(metric):
            metric = None
        before = self._index().entries
        entries = [entry for entry in before if entry.step < step]
        entries.append(_Entry(path.name, step, metric, final))
        kept = entries
        if self._keep == "last":
            kept = self._worth_keeping(_Index(entries, self._higher_is_better))
        index = {
            "format": FORMAT,
            "higher_is_better": self._higher_is_better,
            "checkpoints": [asdict(entry) for entry in kept],
        }
        write_atomically(self.directory / INDEX, (json.dumps(index, indent=1) + "\n").encode())
        if self._keep == "last":
            # Only now, so that a kill cannot leave an index that names a deleted file.
            for name in {entry.file for entry in before} - {entry.file for entry in kept}:
                with suppress(OSError):
                    (self.directory / name).unlink()
        return path

    def load_newest(self) -> tuple[int, dict[str, Any]] | None:
        """Return (step, state) of the newest intact checkpoint, or None; warn of damaged ones.

        Raises:
            DataError: all are damaged, or `read_checkpoint` refuses the newest intact one.
        """
        entries = self._index().entries
        return self._newest_intact(entries) if entries else None

    def _newest_intact(self, entries: "list[_Entry]") -> tuple[int, dict[str, Any]]:
        for entry in reversed(entries):
            try:
                step, state = read_checkpoint(self.directory / entry.file)
            except _DamagedFile as error:
                self._warn(f"{error}; going back to the checkpoint before it")
                continue
            if step == entry.step:
                return step, state
            self._warn(
                f"{self.directory / entry.file} is of step {step}; going back to the checkpoint "
                "before it"
            )
        raise DataError(
            f"every checkpoint in {self.directory} is damaged: restore one from a backup, or "
            "start a new run"
        )

    def load(self, which: str | Path) -> tuple[int, dict[str, Any]]:
        """Return (step, state) of a checkpoint.

        Args:
            which: `last`, `best`, the number of a step, or a file, by path or name.

        Raises:
            DataError: there is none, or it is damaged or refused, as by `read_checkpoint`.
            UsageError: there is no `best`, because the run had no validation split, or none of that
                step.
        """
        if isinstance(which, str) and which.isdecimal():
            steps = self.steps()
            if int(which) not in steps:
                known = ", ".join(map(str, steps)) or "none"
                raise UsageError(
                    f"{self.directory} has no checkpoint of step {which}: the steps are {known}"
                )
            return read_checkpoint(self.file_of(int(which)))
        if which not in ("last", "best"):
            path = Path(which)
            inside = self.directory / path
            return read_checkpoint(inside if inside.is_file() and not path.is_file() else path)
        index = self._index()
        if not index.entries:
            raise DataError(
                f"{self.directory} holds no checkpoint: let the run reach its first one"
            )
        if which == "last":
            return self._newest_intact(index.entries)
        best = self._best(index)
        if best is None:
            raise UsageError(
                "there is no best checkpoint, because the run had no validation split: "
                "use last, or train with --set data.validation=N"
            )
        return read_checkpoint(self.directory / best.file)

    def file_of(self, step: int) -> Path:
        """Return the path of a step's checkpoint."""
        return self.directory / f"step-{step:08d}.pt"

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in order."""
        return [entry.step for entry in self._index().entries]

    def best(self) -> tuple[int, float] | None:
        """Return (step, metric) of the best checkpoint so far; of equal ones, the earliest."""
        best = self._best(self._index())
        return None if best is None or best.metric is None else (best.step, best.metric)

    def _worth_keeping(self, index: "_Index") -> "list[_Entry]":
        entries = index.entries
        kept = {
            *entries[-2:],
            self._best(index),
            *[entry for entry in entries if entry.final][-1:],
        }
        return [entry for entry in entries if entry in kept]

    def _best(self, index: "_Index") -> "_Entry | None":
        measured = [entry for entry in index.entries if entry.metric is not None]
        if not measured:
            return None
        if index.higher_is_better is None:
            raise DataError(
                f"{self.directory / INDEX} is of an older egtrain, and does not say whether a "
                "higher metric is better: name a step instead of best"
            )
        sign = 1 if index.higher_is_better else -1
        return max(measured, key=lambda entry: (sign * (entry.metric or 0.0), -entry.step))

    def _index(self) -> "_Index":
        """Return the index, with its entries in the order of steps."""
        path = self.directory / INDEX
        higher_is_better = None
        try:
            index = json.loads(path.read_bytes())
            found = index["format"]
            entries = [_Entry(**row).checked() for row in index["checkpoints"]]
            higher_is_better = index.get("higher_is_better")
            if higher_is_better not in (True, False, None):
                raise ValueError(higher_is_better)
        except FileNotFoundError:
            entries = []
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError):
            self._warn(
                f"{path} is damaged: going by the names of the checkpoint files; which was the "
                "best is lost"
            )
            matches = [_FILE_NAME.fullmatch(file.name) for file in self.directory.iterdir()]
            entries = [_Entry(m.string, int(m[1]), None, False) for m in matches if m]
        else:
            _refuse_other_formats(path, found)
        if self._higher_is_better is not None:
            higher_is_better = self._higher_is_better
        return _Index(sorted(entries, key=lambda entry: entry.step), higher_is_better)

    def _remove_leftovers(self) -> None:
        """Make the folder, and remove what a killed save left there."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob("*.tmp"):
                leftover.unlink()
        except OSError as error:
            raise cannot_write(self.directory, error) from error


@dataclass(frozen=True, order=True)
class _Entry:
    file: str
    step: int
    metric: float | None
    final: bool

    def checked(self) -> Self:
        """Raise ValueError unless the entry's file name fits its step."""
        match = _FILE_NAME.fullmatch(self.file)
        fits = match is not None and int(match[1]) == self.step
        if not fits or not isinstance(self.metric, int | float | None):
            raise ValueError(self)
        return self


@dataclass(frozen=True)
class _Index:
    entries: list[_Entry]
    higher_is_better: bool | None
    """None: it is of an egtrain that did not write it, or there is no metric."""


def read_checkpoint(path: Path) -> tuple[int, dict[str, Any]]:
    """Verify a checkpoint file and return (step, state); nothing in it is ever executed.

    Raises:
        DataError: it is missing, damaged, of another format, holds code, or is no checkpoint.
    """
    if not path.is_file():
        raise _DamagedFile(f"there is no checkpoint file {path}")
    try:
        with path.open("rb") as file:
            size = _verified_size(file, path)
            file.seek(0)
            content = _load(file, path, size)
    except OSError as error:
        raise _DamagedFile(f"cannot read checkpoint {path}: {error.strerror}") from error
    not_ours = DataError(
        f"{path} is not a checkpoint of egtrain: name a file from the checkpoints folder of a run"
    )
    if not isinstance(content, dict):
        raise not_ours
    _refuse_other_formats(path, content.get("format"))
    step, state = content.get("step"), content.get("state")
    if not isinstance(step, int) or not isinstance(state, dict):
        raise not_ours
    return step, state


def _write(content: dict[str, Any], file: BinaryIO, kill_at: Callable[[str], None]) -> None:
    """Write a checkpoint's bytes and their trailer to an open file."""
    sink = _HashingFile(file)
    try:
        torch.save(content, cast("IO[bytes]", sink))
    except BaseException:
        # torch wraps the operating system's error in its own.
        if sink.error is not None:
            raise sink.error from None
        raise
    file.flush()
    kill_at("save-mid-write")
    file.write(sink.digest.digest() + MAGIC)


class _HashingFile:
    """A file for `torch.save` that passes everything on and computes its SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            self.digest.update(data)
            return self._file.write(data)
        except BaseException as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Do nothing, as files need a `flush`; the bytes are synced once, at the end."""


def _verified_size(file: BinaryIO, path: Path) -> int:
    """Check the checksum and return the number of bytes before the trailer."""
    size = os.fstat(file.fileno()).st_size - _TRAILER
    if size < 0 or file.seek(size) != size or not (trailer := file.read(_TRAILER)).endswith(MAGIC):
        raise _DamagedFile(f"{path} is truncated, or not a checkpoint of egtrain")
    file.seek(0)
    digest = hashlib.sha256()
    rest = size
    while rest and (chunk := file.read(min(rest, _CHUNK))):
        digest.update(chunk)
        rest -= len(chunk)
    if digest.digest() != trailer[: -len(MAGIC)]:
        raise _DamagedFile(f"{path} is damaged: its checksum does not fit")
    return size


def _load(file: BinaryIO, path: Path, size: int) -> Any:
    """Return the content of a verified, yet untrusted file: anyone can make a checksum."""
    try:
        if not begins_as_archive(file):
            raise ValueError("not written by torch.save")
        content = load_plain(file)
        _refuse_inflated(content, size)
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} is refused, because it holds code or objects, which egtrain neither writes "
            "nor loads: use another"
        ) from error
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise DataError(f"{path} is not a checkpoint of egtrain ({reason})") from error
    return content


def begins_as_archive(file: BinaryIO) -> bool:
    """Return whether a file begins as what `torch.save` writes; files before torch 1.6 do not."""
    file.seek(0)
    return file.read(4) == b"PK\x03\x04"


def load_plain(file: BinaryIO) -> Any:
    """Return what `torch.save` wrote: tensors and plain values; code in it does not run.

    Raises:
        pickle.UnpicklingError: it holds code or objects, or is no such file.
        ValueError: it is compressed.
    """
    if begins_as_archive(file):
        with zipfile.ZipFile(file) as archive:
            # torch.save never compresses; a small compressed record could fill the memory.
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise ValueError("compressed")
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Explicit, so that no environment variable and no setting of torch can change them.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=False)


def _refuse_inflated(content: Any, size: int) -> None:
    """Raise ValueError where a tensor is not dense, or declares more than the file holds."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise ValueError("a tensor is not dense")
            held = min(value.untyped_storage().nbytes(), size)
            if value.numel() * value.element_size() > held:
                raise ValueError(
                    f"a tensor of shape {list(value.shape)} declares more than the file holds"
                )


def _portable(value: Any, where: str) -> Any:
    """Return a nested value with its tensors on the CPU, none a view of a larger one."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        return tensor
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{where} has a key {key!r}: a checkpoint's keys are str or int")
        return {key: _portable(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_portable(item, f"{where}[{index}]") for index, item in enumerate(value))
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise TypeError(
        f"{where} is a {type(value).__qualname__}: a checkpoint holds tensors and plain values only"
    )


def _refuse_other_formats(path: Path, found: Any) -> None:
    if isinstance(found, int) and found > FORMAT:
        raise DataError(
            f"{path} has format {found}, and this egtrain reads up to {FORMAT}: update egtrain"
        )
    if isinstance(found, int) and found < FORMAT:
        raise DataError(
            f"{path} has format {found}, and this egtrain reads {FORMAT}: use the egtrain that "
            "wrote it, or start a new run"
        )


def _kill_at(point: str, save: int) -> None:
    """Kill this process (SIGKILL) if a test asked for it; for tests only.

    `EGTRAIN_TEST_FAULT` is one of save-before-write, save-mid-write, save-before-sync,
    save-before-rename, save-before-index, with `:N` for the N-th save of the process (default: the
    first). After a restart by torchrun nothing is killed, so that the restarted run can succeed.
    """
    wanted, _, number = os.environ.get(FAULT_VARIABLE, "").partition(":")
    if (
        wanted == point
        and save == int(number or 1)
        and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    ):
        os.kill(os.getpid(), signal.SIGKILL)


def _warn_on_stderr(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
