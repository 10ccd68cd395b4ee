"""Reading the official pickled images without running code that a pickle names."""

import io
import pickle
from typing import Any

import numpy as np

from egtrain.errors import DataError


class _Bytes:
    """Stands in for numpy.ndarray while unpickling, and keeps its state."""

    state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Type:
    """Stands in for numpy.dtype, which is not needed for bytes."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# A harmless stand-in for every name in the files, so that a pickle never calls NumPy.
_ADMITTED: dict[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Bytes(),
    ("numpy", "ndarray"): _Bytes,
    ("numpy", "dtype"): _Type,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise DataError(
                f"a pickle asks for {module}.{name}, which image data do not need; "
                "delete the file's folder to have the data downloaded again"
            ) from None


def load_plain_pickle(content: bytes) -> dict[bytes, Any]:
    """Unpickle a Python 2 dict of plain values and uint8 arrays; its strings come back as bytes.

    Raises:
        DataError: the pickle names anything else; nothing of it has run.
    """
    batch = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    return {
        key: np.frombuffer(value.state[4], np.uint8).reshape(value.state[1])
        if isinstance(value, _Bytes)
        else value
        for key, value in batch.items()
    }
