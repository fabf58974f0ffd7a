"""Where the rows of a file begin and end, found in one pass that holds none of them.

A file of rows is a `.jsonl`, a `.json` with a list, a VLMEvalKit table or a plain text; see
`records.read_records`, which reads the same rows and holds those that it was asked for.
"""

import contextlib
import csv
import io
import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hipp_ext.calibration.records import (
    LINE_BYTES,
    MISSING,
    SHAPES,
    lines_of,
    long_cells,
    parsed_line,
    reference_of,
    table_header,
)
from hipp_ext.errors import CalibrationError, DataError
from hipp_ext.files.untrusted import shown

Span = tuple[int, int]  # first byte of a row, and the first after it
Parse = Callable[[bytes], Any]  # bytes of a row -> its record, or the DataError of reading it
SEARCH = 1 << 10  # bytes in which a text is cut at a space
# What JSON is made of, as far as it tells where the members of a list are.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]|[^\s\[\]{}",:]+', re.DOTALL)


def scan(path: Path, file: BinaryIO, text_bytes: Callable[[], int]) -> tuple[Iterator[Span], Parse]:
    """The spans of the rows of an open file, and what reads a row from its bytes.

    Args:
        path: name of the file, which tells its kind.
        file: the file.
        text_bytes: function that returns the bytes of a row of plain text.

    Raises:
        CalibrationError: the file is of no kind that is read.
        DataError (also while iterating): it is damaged.
    """
    kind = path.suffix.lower()
    if kind == ".json":
        kind = ".list" if _is_list(file) else ".jsonl"
    if kind in (".jsonl", ".ndjson"):
        return _line_spans(path, file), parsed_line
    if kind == ".list":
        return _member_spans(path, file), parsed_line
    if kind == ".tsv":
        header = _header(path, file)
        return _cell_spans(path, file), lambda data: _table_row(header, data)
    if kind == ".txt":
        return _text_spans(file, text_bytes()), _text_row
    raise CalibrationError(f"{shown(path)} is of no kind that is read. Give {SHAPES}.")


def _mapped(file: BinaryIO) -> Any:
    """The bytes of the file, mapped into memory; an empty file cannot be."""
    if not file.seek(0, io.SEEK_END):
        return b""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _line_spans(path: Path, file: BinaryIO) -> Iterator[Span]:
    file.seek(0)
    end = 0
    for line in lines_of(path, file):
        start, end = end, end + len(line)
        if not line.isspace():
            yield start, end


# ------------------------------------------------------------------------------------ a JSON list


def _is_list(file: BinaryIO) -> bool:
    """Whether a .json holds one value, a list or an object of several lines, and not JSON lines."""
    file.seek(0)
    line = file.readline(LINE_BYTES).lstrip(b"\xef\xbb\xbf").lstrip()
    return line[:1] in (b"[", b"") or isinstance(parsed_line(line), DataError)


def _member_spans(path: Path, file: BinaryIO) -> Iterator[Span]:
    """The members of the list; the whole value, where it is none."""
    data = _mapped(file)
    depth, start, level = 0, 0, 0
    for token in _TOKEN.finditer(data):
        opening = token[0] in (b"[", b"{")
        if not depth and level:
            raise DataError(f"{shown(path)} is not valid JSON: something follows its end")
        if not depth:
            level = 1 if token[0] == b"[" else 2  # members are one deep, or the value is the row
            if level == 2:
                start = token.start()
        elif depth == 1 and level == 1 and token[0] not in (b"]", b"}"):
            start = token.start()
            if not opening:
                yield start, token.end()
        depth += opening - (token[0] in (b"]", b"}"))
        if token[0] in (b"]", b"}") and depth == (1 if level == 1 else 0):
            yield start, token.end()
    if depth:
        raise DataError(f"{shown(path)} is not valid JSON: it ends too early")


# ------------------------------------------------------------------------------------------ tables


def _decoded(lines: Any) -> Iterator[str]:
    return (line.decode("utf-8-sig") for line in lines)


def _header(path: Path, file: BinaryIO) -> list[str]:
    file.seek(0)
    with _table_errors(path):
        return table_header(path, csv.reader(_decoded(lines_of(path, file)), delimiter="\t"))


@contextlib.contextmanager
def _table_errors(path: Path) -> Iterator[None]:
    try:
        with long_cells():
            yield
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{shown(path)} cannot be read as a table: {error}") from None


def _cell_spans(path: Path, file: BinaryIO) -> Iterator[Span]:
    file.seek(0)
    end = 0

    def counted() -> Iterator[bytes]:
        nonlocal end
        for line in lines_of(path, file):
            end += len(line)
            yield line

    with _table_errors(path):
        rows = csv.reader(_decoded(counted()), delimiter="\t")
        next(rows, None)
        start = end
        for row in rows:
            if row:
                yield start, end
            start = end


def _table_row(header: list[str], data: bytes) -> dict[str, Any]:
    with long_cells():
        cells = next(csv.reader(_decoded(io.BytesIO(data)), delimiter="\t"))
    row: dict[str, Any] = {
        name: cell for name, cell in zip(header, cells, strict=False) if cell not in MISSING
    }
    # A short cell names another row, whose picture it is; see `RowFile`.
    return row if reference_of(row) else with_picture(row)


def with_picture(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its picture, if it has one, marked as base64."""
    return row | {"image": {"base64": row["image"]}} if "image" in row else row


# ------------------------------------------------------------------------------------- plain texts


def _text_spans(file: BinaryIO, size: int) -> Iterator[Span]:
    """Pieces of about `size` bytes, cut at a space, or else between two characters."""
    data = _mapped(file)
    start = 3 if data[:3] == b"\xef\xbb\xbf" else 0
    while start < len(data):
        end = min(start + size, len(data))
        if end < len(data):
            spaces = [i for i in (data.find(b, end, end + SEARCH) for b in (b" ", b"\n")) if i >= 0]
            end = min(spaces) + 1 if spaces else end
            while end < len(data) and data[end] & 0xC0 == 0x80:  # inside a character
                end += 1
        if data[start:end].strip():
            yield start, end
        start = end


def _text_row(data: bytes) -> Any:
    try:
        return {"text": data.decode()}
    except UnicodeDecodeError as error:
        return DataError(f"it is not UTF-8 text: {error}")
