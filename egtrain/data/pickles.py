"""Reading a pickle that may hold nothing but plain values and byte arrays, so that it can never run
code.
"""

import io
import math
import pickle

import numpy as np
from numpy.typing import NDArray


class UnsafePickle(Exception):
    """The pickle asks for something beyond plain values and uint8 arrays, or is damaged; the
    message says which.
    """


class _PlainArray:
    """Stands in for numpy.ndarray while unpickling; keeps what the pickle says until it has been
    checked.
    """

    def __init__(self) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def to_numpy(self) -> NDArray[np.uint8]:
        match self.state:
            case (
                int(),
                tuple(shape),
                _PlainType(kind=("u1" | b"u1")),
                bool(by_columns),
                bytes(content),
            ) if all(type(size) is int and size >= 0 for size in shape):
                if math.prod(shape) != len(content):
                    raise UnsafePickle(
                        f"an array of shape {list(shape)} comes with {len(content):,} bytes"
                    )
                return np.frombuffer(content, np.uint8).reshape(
                    shape, order="F" if by_columns else "C"
                )
        raise UnsafePickle("it holds an array of something other than bytes")


class _PlainType:
    """Stands in for numpy.dtype."""

    def __init__(self, kind: object, *_: object) -> None:
        self.kind = kind

    def __setstate__(self, state: object) -> None:
        """The byte order and field table mean nothing for single bytes."""


def _reconstruct(*_: object) -> _PlainArray:
    return _PlainArray()


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise UnsafePickle("it encodes something that is not Latin-1 text")
    return text.encode("latin1")


# Every name that the files need, each with a harmless stand-in: NumPy itself is never called with
# what a pickle says. The private NumPy module moved in NumPy 2; _codecs.encode is how Python 3
# writes bytes in protocol 2.
_ADMITTED: dict[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _PlainArray,
    ("numpy", "dtype"): _PlainType,
    ("_codecs", "encode"): _encode,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise UnsafePickle(
                f"it asks for {module}.{name}, which image data do not need"
            ) from None

    def persistent_load(self, _: object) -> object:
        raise UnsafePickle("it refers to an object outside the file")


def load_plain_pickle(content: bytes) -> object:
    """Unpickle bytes, str, int, list, tuple, dict and uint8 arrays; a top-level dict has its arrays
    as NumPy arrays.

    Python 2 strings come back as bytes. Raises `UnsafePickle` for anything else, before it has any
    effect.
    """
    try:
        value = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
        if isinstance(value, dict):
            return {
                key: item.to_numpy() if isinstance(item, _PlainArray) else item
                for key, item in value.items()
            }
        return value
    except UnsafePickle:
        raise
    # A damaged pickle may fail in any way that its opcodes can: all of them mean the same to the
    # user.
    except Exception as problem:
        raise UnsafePickle(
            f"it is not a readable pickle ({type(problem).__name__}: {problem})"
        ) from problem
