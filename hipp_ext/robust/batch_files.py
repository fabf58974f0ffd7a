"""CIFAR's batch files, which are pickles, read as data: nothing is unpickled, and nothing that a file names is ever called.

The operations of the file are listed by pickletools, which runs none of them, and the few that such files are made of are
followed here: numbers, strings, lists, dictionaries, and arrays of bytes as numpy 1 and 2 under Python 2 and 3 wrote them.
"""

import io
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

MOST_BYTES = 256 * 2**20  # of a file; the largest that is published has 156 MB
MOST_OPERATIONS = 2_000_000  # it has 310,000
KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
MARK = object()


class BatchFileError(Exception):
    """What in a file is not as such files are."""


class _Named:
    """A name that a file holds, what it is called with, and the state given to it: a record, and no more."""

    def __init__(self, name: str, arguments: tuple | None = None):
        self.name, self.arguments = name, arguments
        self.state: tuple | None = None


def read_batch_file(path: Path) -> dict:
    """What the file holds, byte arrays as numpy arrays.

    Raises:
        BatchFileError: it is not what such a file holds, is too large, or holds no dictionary.
    """
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise BatchFileError(f"files of up to {MOST_BYTES >> 20} MB are read")
    return parse_batch(path.read_bytes())


def parse_batch(text: bytes) -> dict:
    """`read_batch_file` for a file's content."""
    machine = _Machine(len(text))
    try:
        for number, (operation, argument, _) in enumerate(pickletools.genops(io.BytesIO(text))):
            if number >= MOST_OPERATIONS:
                raise BatchFileError(f"it has more than {MOST_OPERATIONS} operations")
            machine.do(operation.name, argument)
        content = machine.stack.pop()
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BatchFileError(f"{type(error).__name__}: {str(error)[:200]}") from error
    if type(content) is not dict:
        raise BatchFileError(f"a dictionary was expected, got {type(content).__name__}")
    return {
        key: _array(value) if isinstance(value, _Named) else value for key, value in content.items()
    }


class _Machine:
    """The stack and the memory of a pickle, for the operations of data only."""

    def __init__(self, size: int):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.left = size  # bytes that text may be turned into: every string stands in the file once

    def do(self, name: str, argument: Any) -> None:
        if name in ("SHORT_BINSTRING", "BINSTRING", "STRING"):  # Python 2's; its text is bytes
            self.stack.append(argument.encode("latin-1"))
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in VALUES:
            self.stack.append(argument)
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(self._named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            module, attribute = self._pop(2)
            self.stack.append(self._named(module, attribute))
        elif name in ("REDUCE", "BUILD"):
            (self._reduce if name == "REDUCE" else self._build)(*self._pop(2))
        elif name in ("TUPLE", "LIST", "DICT", "TUPLE1", "TUPLE2", "TUPLE3"):
            items = self._pop(int(name[5:])) if name[5:] else self._marked()
            self.stack.append(
                self._filled({}, items)
                if name == "DICT"
                else (list if name == "LIST" else tuple)(items)
            )
        elif name in ("APPEND", "APPENDS"):
            items = self._pop(1) if name == "APPEND" else self._marked()
            self._top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if name == "SETITEM" else self._marked()
            self._filled(self._top(dict), items)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise BatchFileError(f"it holds a {name}, which no file of this set does")

    def _pop(self, count: int) -> list:
        items = self.stack[-count:]
        if len(items) < count or any(i is MARK for i in items):
            raise BatchFileError("its operations do not fit together")
        del self.stack[-count:]
        return items

    def _marked(self) -> list:
        place = max(i for i, item in enumerate(self.stack) if item is MARK)
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def _top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise BatchFileError("its operations do not fit together")
        return self.stack[-1]

    @staticmethod
    def _filled(target: dict, items: list) -> dict:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (bytes, str, int):  # others can take for ever to be hashed
                raise BatchFileError(f"a key of type {type(key).__name__}")
            target[key] = value
        return target

    @staticmethod
    def _named(module: Any, name: Any) -> _Named:
        if (module, name) not in KNOWN:
            raise BatchFileError(
                f"it names {module}.{name}, which no file of this set holds; it was not loaded"
            )
        return _Named(name)

    def _reduce(self, called: Any, arguments: Any) -> None:
        if (
            type(called) is not _Named
            or called.arguments is not None
            or type(arguments) is not tuple
        ):
            raise BatchFileError("its operations do not fit together")
        if called.name == "encode":  # how Python 3 writes bytes for Python 2
            text, codec = arguments
            self.left -= len(text)
            if type(text) is not str or codec != "latin1" or self.left < 0:
                raise BatchFileError("text that is no bytes")
            self.stack.append(text.encode("latin-1"))
        else:
            self.stack.append(_Named(called.name, arguments))

    def _build(self, target: Any, state: Any) -> None:
        if type(target) is not _Named or target.arguments is None or type(state) is not tuple:
            raise BatchFileError("its operations do not fit together")
        target.state = state
        self.stack.append(target)


VALUES = {
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "FLOAT",
    "BINFLOAT",
    "SHORT_BINBYTES",
    "BINBYTES",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "UNICODE",
}
EMPTY: dict[str, Any] = {
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: MARK,
}


def _array(record: _Named) -> np.ndarray:
    """The array that a record describes: of bytes, and as long as its shape says."""
    if record.name != "_reconstruct" or record.state is None or len(record.state) != 5:
        raise BatchFileError(f"a {record.name} where an array was expected")
    _, shape, kind, by_columns, data = record.state
    if (
        type(kind) is not _Named
        or kind.name != "dtype"
        or not kind.arguments
        or kind.arguments[0] not in ("u1", b"u1")
    ):
        raise BatchFileError("an array of something else than bytes")
    whole = (
        type(shape) is tuple
        and len(shape) <= 4
        and all(type(n) is int and 0 <= n <= MOST_BYTES for n in shape)
    )
    size = 1
    for n in shape if whole else ():
        size *= n
    if not whole or type(data) is not bytes or size != len(data):
        raise BatchFileError("an array whose shape is not that of its data")
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_columns is True else "C")
