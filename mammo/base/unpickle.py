"""Read pickles of plain data without running anything in them: lists, dicts, numbers, texts and NumPy arrays."""

import io
import os
import pickle
import pickletools
import re
from typing import Any

import numpy as np

from mammo.base.files import InputError

_EXPECTED = (
    "Expected lists, dicts and NumPy arrays of numbers alone: opening anything else can run code. Where you trust the "
    "file, convert it with Python: load it, and pickle the same as plain lists and dicts"
)

# How many times the bytes of a file may be copied into arrays.
_MAX_COPIES = 4


def load_plain(path: str | os.PathLike) -> Any:
    """Return the content of a pickle of lists, dicts, tuples, numbers, texts and NumPy arrays, of Python 2 too.

    Nothing in the file is executed: whatever it names is looked up in a short table of stand-ins here, and arrays are
    made from their bytes. Memory is bounded by a multiple of the file's size. One object may stand in the result
    many times, so that following all references can take far longer than the file is large.
    Raises InputError for a file that cannot be read, is no whole pickle, or holds anything else.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
        _check_memo(data)
        return _PlainUnpickler(data).load()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged pickles end in errors of many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: not a whole pickle ({reason}); copy or compute it again") from error


def _check_memo(data: bytes) -> None:
    """Raise ValueError for lengths beyond the file's end, and numbers of remembered objects beyond their count.

    The unpickler reserves memory for both before it looks whether they can be true.
    """
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise ValueError(f"object number {argument} after {count} operations")


def _as_bytes(data: bytes | str) -> bytes:
    """Return the bytes of an array, which are a text in pickles of Python 2."""
    return data.encode("latin1") if isinstance(data, str) else data


class _Dtype:
    """Stand for numpy.dtype in a pickle: numbers and texts alone, since other types hold pointers.

    spend: called with the bytes of each array that is made.
    """

    def __init__(self, code, spend):
        if not re.fullmatch(r"[<>|=]?[fiubSU]\d{1,4}", code):
            raise InputError(f"holds an array of {code}. {_EXPECTED}")
        self.dtype = np.dtype(code)
        self.spend = spend

    def __setstate__(self, state):
        if state[1] in ("<", ">"):  # of the state the byte order alone
            self.dtype = self.dtype.newbyteorder(state[1])

    def values(self, data, shape, order="C") -> np.ndarray:
        """Return the array of this type, shape and order with these bytes (of Python 2: a text)."""
        array = np.frombuffer(_as_bytes(data), self.dtype).reshape(shape, order=order)
        self.spend(array.nbytes)
        return array


class _Array(np.ndarray):
    """Stand for numpy.ndarray in a pickle: takes its state only from an array that was made from the bytes there."""

    def __new__(cls, *_):
        return super().__new__(cls, 0)

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        data = _as_bytes(data)
        values = dtype.values(data, shape, "F" if fortran else "C")
        super().__setstate__((1, values.shape, values.dtype, bool(fortran), data))  # copies the bytes of few arrays


class _PlainUnpickler(pickle.Unpickler):
    """Call nothing but stand-ins for what pickles of arrays call, and copy no more bytes than honest ones ask for.

    The bytes of an honest pickle's array are copied twice: encoded, and as an array. Others can name one text or array
    again and again, a few bytes for each copy.
    """

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="latin1")
        left = _MAX_COPIES * len(data)

        def spend(size: int) -> None:
            nonlocal left
            left -= size
            if left < 0:
                raise InputError("refused: copies the same bytes many times. Expected each array once")

        def encode(text: str, _) -> bytes:  # how Python 3 writes bytes for Python 2
            spend(len(text))
            return text.encode("latin1")

        # By module without "numpy.core." or "numpy._core.", which is so by NumPy's version.
        self._stand_ins = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): lambda code, *_: _Dtype(code, spend),
            ("multiarray", "_reconstruct"): _Array,
            ("multiarray", "scalar"): lambda dtype, data: dtype.values(data, ())[()],
            ("numeric", "_frombuffer"): lambda data, dtype, shape, order: dtype.values(data, shape, order),
            ("_codecs", "encode"): encode,
        }

    def find_class(self, module, name):
        key = module.removeprefix("numpy.core.").removeprefix("numpy._core."), name
        if key not in self._stand_ins:
            raise InputError(f"holds {module}.{name}. {_EXPECTED}")
        return self._stand_ins[key]
