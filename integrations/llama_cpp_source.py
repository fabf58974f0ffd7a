"""The tokenizer of another GGUF file, such as one of the unpruned model."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hipp_ext.errors import CheckpointError
from hipp_ext.files.untrusted import open_plain
from hipp_ext.integrations.llama_cpp_file import load_gguf
from hipp_ext.integrations.llama_cpp_tokenizer import UNUSED

_PREFIX = "tokenizer."
_TOKENS = "tokenizer.ggml.tokens"
_FILLERS = {"tokenizer.ggml.token_type": UNUSED, "tokenizer.ggml.scores": 0.0}
_LARGEST = 1 << 42  # bytes
_VERSIONS = (2, 3)
# Numbers of GGUF's types of values.
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True)
class _Field:
    value: Any
    kind: int
    part: int | None  # of the members of an array


def copied_tokenizer(path: str | Path, rows: int) -> Callable[[Any], None]:
    """A function that adds the tokenizer of a GGUF file to a gguf.GGUFWriter.

    Args:
        path: the file.
        rows: rows of the model's embedding; those that no token has become unused tokens.

    Raises:
        DataError: there is no such file.
        CheckpointError: it is no GGUF file, is damaged, or has another number of tokens.
    """
    with open_plain(path, _LARGEST, "GGUF file") as file:
        try:
            fields = _Reader(file).tokenizer()
        except (ValueError, struct.error) as error:
            raise CheckpointError(f"{path} is no GGUF file, or is damaged: {error}") from error
    tokens = fields.get(_TOKENS)
    listed = tokens is not None and tokens.part == _STRING
    count = len(tokens.value) if tokens is not None and listed else 0
    if not 0 < count <= rows:
        raise CheckpointError(
            f"{path} has a tokenizer of {count} tokens, and the model {rows} rows of embeddings: "
            "give the GGUF file of the same model before it was pruned."
        )
    for name in _FILLERS:
        if name in fields and (fields[name].part is None or len(fields[name].value) != count):
            raise CheckpointError(f"{path} is damaged: {name} has not one value for each token.")
    types = load_gguf().GGUFValueType

    def add(writer: Any) -> None:
        for name, field in fields.items():
            value = field.value
            if name == _TOKENS:
                value = [*value, *(f"[PAD{i}]" for i in range(count, rows))]
            elif name in _FILLERS:
                value = [*value, *[_FILLERS[name]] * (rows - count)]
            part = None if field.part is None else types(field.part)
            writer.add_key_value(name, value, types(field.kind), part)

    return add


class _Reader:
    """Metadata of a GGUF file. gguf's own reader trusts the lengths in the file, and would look for
    the members of an array that has no end.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.left = file.seek(0, 2)
        file.seek(0)

    def tokenizer(self) -> dict[str, _Field]:
        """The fields of the tokenizer. Raises ValueError or struct.error for a damaged file."""
        if self._bytes(4) != b"GGUF" or (version := self._number("I")) not in _VERSIONS:
            raise ValueError(f"it does not begin with GGUF and a version of {_VERSIONS}")
        del version
        self._number("Q")  # tensors, which come behind the fields
        fields = {}
        for _ in range(self._number("Q")):
            name = self._string().decode("utf-8", "replace")
            kind = self._number("I")
            value, part = self._array() if kind == _ARRAY else (self._values(kind, 1)[0], None)
            if name.startswith(_PREFIX) and (part is None or value):
                fields[name] = _Field(value=value, kind=kind, part=part)
        return fields

    def _array(self) -> tuple[list[Any], int]:
        part = self._number("I")
        return self._values(part, self._number("Q")), part

    def _values(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            if 8 * count > self.left:
                raise ValueError(f"{count:,} texts do not fit into it")
            return [self._string() for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError(f"it has a value of the unknown type {kind}")
        code = f"<{_NUMBERS[kind]}"
        data = self._bytes(count * struct.calcsize(code))
        return [value for (value,) in struct.iter_unpack(code, data)]

    def _string(self) -> bytes:
        return self._bytes(self._number("Q"))

    def _number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))[0]

    def _bytes(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"{count:,} bytes are needed where {self.left:,} are left")
        self.left -= count
        return self.file.read(count)
