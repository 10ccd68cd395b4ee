"""Weights as plain files, which need no egtrain: safetensors, and a state_dict of torch."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from egtrain.disk import cannot_write, write_atomically
from egtrain.errors import UsageError


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
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
