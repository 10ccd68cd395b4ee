"""Weights as plain files, which need no egtrain: safetensors, and a state_dict of torch."""

import hashlib
import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from egtrain.checkpoint import MAGIC, CheckpointStore, load_plain, read_checkpoint
from egtrain.disk import cannot_write, write_atomically
from egtrain.errors import DataError, UsageError
from egtrain.run_directory import CHECKPOINTS, CONFIG

STATE_KEYS = ("state_dict", "model_state_dict", "model")
"""Where a file of `torch.save` may hold its state_dict, beside other things."""


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a plain state_dict, atomically, in the form that the ending says.

    Args:
        path: ends with .safetensors, or else it is a file of `torch.save`; its folder is made.
        tensors: by name; each is written whole, also where two share their memory.
        metadata: for safetensors; a state_dict of torch has no place for it.

    Raises:
        EgtrainError: the file could not be written.
        UsageError: it cannot hold the weights.
    """
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    if path.suffix == ".safetensors":
        try:
            content = _in_one_order(safetensors.torch.save(plain, dict(metadata)))
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise UsageError(
                f"safetensors cannot hold these weights ({error}): write a .pt file instead"
            ) from error
    else:
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        content = buffer.getvalue()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    write_atomically(path, content)


def file_of(path: Path) -> Path:
    """Return a file of weights: of a run directory that of its newest checkpoint, made absolute.

    Raises:
        DataError: it is not there, or the run has no intact checkpoint.
        UsageError: the directory holds no run.
    """
    path = path.expanduser().absolute()
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(
            f"there are no weights {path}: name a .safetensors or .pt file, or a run directory"
        )
    if not (path / CONFIG).is_file():
        raise UsageError(
            f"{path} holds no run: name a directory that `train` made, or a file of weights"
        )
    store = CheckpointStore(path / CHECKPOINTS)
    step, _ = store.load("last")
    return store.file_of(step)


def read_weights(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU; nothing in it is ever executed.

    Args:
        path: safetensors, if it ends so; else a checkpoint of egtrain, or what `torch.save` made of
            a state_dict, alone or under one of `STATE_KEYS`.
        sha256: the file's; None: any.

    Raises:
        DataError: it is missing, damaged, another one, or holds no weights alone.
    """
    try:
        if sha256 is not None and sha256_of(path) != sha256:
            raise DataError(
                f"{path} is not the file of weights that was named at first (its SHA-256 is "
                "another): bring that back, or start a new run"
            )
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - len(MAGIC)))
            if file.read() == MAGIC:
                content = read_checkpoint(path)[1].get("model")
            else:
                file.seek(0)
                content = _loaded(file, path)
    except OSError as error:
        raise DataError(f"cannot read the weights {path}: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} is refused: it is damaged, no file of torch.save, or holds code or objects; "
            "save model.state_dict() alone"
        ) from error
    found = _state_in(content)
    if not found:
        raise DataError(f"{path} holds no weights: save model.state_dict() alone")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise DataError(
                f"{path} is no state_dict: its {name!r} is no tensor; save model.state_dict() alone"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise DataError(f"{path} holds {name!r} in a form that is not dense: save it dense")
    return found


def _loaded(file: BinaryIO, path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(file.read())
        return load_plain(file)
    except (OSError, MemoryError, torch.OutOfMemoryError, pickle.UnpicklingError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise DataError(
            f"{path} is damaged, or holds no weights ({reason}): write it anew, as .safetensors or "
            "by torch.save(model.state_dict(), FILE)"
        ) from error


def _state_in(content: Any) -> dict[str, Any]:
    """Return the state_dict in what a file holds; empty if there is none."""
    if not isinstance(content, dict):
        return {}
    for key in STATE_KEYS:
        if isinstance(content.get(key), dict):
            return dict(content[key])
    return dict(content)


def _in_one_order(content: bytes) -> bytes:
    """Return a safetensors file whose metadata are sorted: they are written in a random order.

    So the same weights make the same file, which is known by its SHA-256.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers stay aligned
    return len(text).to_bytes(8, "little") + text + content[end:]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}): change its permissions, or name another"
        ) from error
