"""A file of the user's -> its rows: a deterministic choice of them, read one by one.

The file may be anybody's: it is a plain file of a bearable size, lines and cells have a limit,
and nothing in it is executed.
"""

import contextlib
import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from hipp_ext.errors import CalibrationError, DataError
from hipp_ext.files.untrusted import (
    JSON_BYTES,
    PICTURE_BYTES,
    TABLE_BYTES,
    is_below,
    open_plain,
    parse_json,
    read_json,
    read_plain,
    shown,
)

LINE_BYTES = 2 * PICTURE_BYTES  # a picture in base64, and what else stands in its line
# What pandas, and so VLMEvalKit, takes for a missing cell.
MISSING = frozenset(["", "NA", "N/A", "n/a", "NaN", "nan", "None", "null", "NULL", "<NA>"])
REFERENCE = 64  # characters; VLMEvalKit takes a shorter image for the index of a row that has it
SHAPES = (
    "a VLMEvalKit table (.tsv), chats or texts (.jsonl, .json), plain text (.txt), or a folder "
    "that `datasets` saved to disk"
)
Record = tuple[int, Any]  # number of the row, from 1; its content, or the DataError of reading it


def spaced(total: int, rows: int) -> list[int]:
    """`rows` of the numbers below `total`, evenly spaced; all of them where there are fewer."""
    return [i * total // rows for i in range(rows)] if rows < total else list(range(total))


def read_records(path: Path, rows: int) -> list[Record]:
    """`rows` rows of the file, evenly spaced, in their order; all where the file has fewer.

    Raises:
        CalibrationError: the file is of no kind that is read.
        DataError: it cannot be read, or is damaged.
    """
    if path.is_dir():
        return _read_dataset(path, rows)
    readers: dict[str, Callable[[Path, int], list[Record]]] = {
        ".tsv": _read_table,
        ".jsonl": _read_lines,
        ".ndjson": _read_lines,
        ".json": _read_json,
    }
    if path.suffix.lower() not in readers:
        raise CalibrationError(f"{shown(path)} is of no kind that is read. Give {SHAPES}.")
    return readers[path.suffix.lower()](path, rows)


def _picked(make: Callable[[], Iterator[Any]], rows: int) -> Iterator[Record]:
    """The rows that are chosen from what `make` iterates over, in a second pass."""
    chosen = set(spaced(sum(1 for _ in make()), rows))
    return ((i + 1, row) for i, row in enumerate(make()) if i in chosen)


def lines_of(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The lines of an open file, from where it is read; DataError for one that is too long."""
    while line := file.readline(LINE_BYTES):
        if len(line) == LINE_BYTES:
            raise DataError(f"{shown(path)} has a line of more than {LINE_BYTES:,} bytes")
        yield line


def _read_lines(path: Path, rows: int) -> list[Record]:
    with open_plain(path, TABLE_BYTES, "file of chats") as file:

        def filled() -> Iterator[bytes]:
            file.seek(0)
            return (line for line in lines_of(path, file) if not line.isspace())

        return [(number, parsed_line(line)) for number, line in _picked(filled, rows)]


def parsed_line(line: bytes) -> Any:
    """The value of a line of JSON, or the DataError of reading it."""
    try:
        return parse_json(line, "it")
    except DataError as error:
        return error


def _read_json(path: Path, rows: int) -> list[Record]:
    data = read_plain(path, JSON_BYTES, "JSON file")
    try:
        content = parse_json(data, shown(path))
    except DataError:
        # JSON lines are often called .json.
        if isinstance(parsed_line(data.lstrip().partition(b"\n")[0]), DataError):
            raise
        return _read_lines(path, rows)
    records = content if isinstance(content, list) else [content]
    return [(i + 1, records[i]) for i in spaced(len(records), rows)]


# ---------------------------------------------------------------------------------------- tables


@contextlib.contextmanager
def long_cells() -> Iterator[None]:
    """The csv module's limit is raised to what a picture takes."""
    before = csv.field_size_limit(LINE_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def table_header(path: Path, rows: Iterator[list[str]]) -> list[str]:
    """The names of the columns, from the first of `rows`; DataError if it is no header."""
    header = next(rows, [])
    if "question" not in header:
        raise DataError(
            f"{shown(path)}: a VLMEvalKit table has the column question; this one has "
            f"{shown(', '.join(header), 300) or 'no header'}"
        )
    return header


def _cells(path: Path, file: BinaryIO) -> Iterator[dict[str, str]]:
    file.seek(0)
    text = (line.decode("utf-8-sig") for line in lines_of(path, file))
    try:
        rows = csv.reader(text, delimiter="\t")
        header = table_header(path, rows)
        for row in rows:
            if row:
                cells = zip(header, row, strict=False)
                yield {name: cell for name, cell in cells if cell not in MISSING}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{shown(path)} cannot be read as a table: {error}") from None


def _read_table(path: Path, rows: int) -> list[Record]:
    with open_plain(path, TABLE_BYTES, "table") as file, long_cells():
        records = list(_picked(lambda: _cells(path, file), rows))
        wanted = {cell for _, row in records if (cell := reference_of(row)) is not None}
        found = {}
        if wanted:  # rows that repeat another row's picture
            for row in _cells(path, file):
                if row.get("index") in wanted and reference_of(row) is None:
                    found[row["index"]] = row.get("image")
    return [(number, _with_picture(row, found)) for number, row in records]


def reference_of(row: dict[str, str]) -> str | None:
    """The index of the row whose picture this one has, too; or a very small picture; or None."""
    cell = row.get("image")
    return cell if cell is not None and len(cell) <= REFERENCE else None


def _with_picture(row: dict[str, str], found: dict[str, Any]) -> dict[str, Any]:
    """The row with its picture marked as base64."""
    if "image" not in row:
        return row
    reference = reference_of(row)
    cell = row["image"] if reference is None else found.get(reference, reference)
    return row | {"image": {"base64": cell}}


# ------------------------------------------------------------------------------- datasets folders


def _read_dataset(path: Path, rows: int) -> list[Record]:
    table = read_arrow(path)
    return [(i + 1, arrow_row(table, path, i)) for i in spaced(table.num_rows, rows)]


def read_arrow(path: Path) -> Any:
    """The table of a folder that `datasets` saved, mapped into memory.

    Raises:
        CalibrationError: it is no such folder, or pyarrow is missing.
        DataError: it is damaged.
    """
    if (path / "dataset_dict.json").is_file():
        inside = sorted(shown(p.name) for p in path.iterdir() if p.is_dir())
        raise CalibrationError(
            f"{shown(path)} holds several splits. Give one of them: {path.name}/"
            f"{', '.join(inside)[:300]}."
        )
    if not (path / "state.json").is_file():
        raise CalibrationError(f"{shown(path)} is no folder that `datasets` saved. Give {SHAPES}.")
    try:
        import pyarrow as pa
    except ImportError:
        raise CalibrationError(
            f"{shown(path)} is read with the package datasets: pip install datasets"
        ) from None
    with _arrow_errors(path):
        shards = [pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in _shards(path)]
        return pa.concat_tables(shards)


def arrow_row(table: Any, path: Path, number: int) -> dict[str, Any]:
    """A row of the table, checked; pictures as the bytes that are stored."""
    with _arrow_errors(path):
        row = table.slice(number, 1)
        row.validate(full=True)
        return row.to_pylist()[0]


@contextlib.contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # Arrow has an error of its own for every damage
        why = shown(error, 300)
        raise DataError(f"{shown(path)} cannot be read as Arrow tables: {why}") from None


def _shards(path: Path) -> Iterable[Path]:
    state = read_json(path / "state.json")
    files = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(files, list) or not files:
        raise DataError(f"{shown(path / 'state.json')} names no data files")
    for entry in files:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not is_below(path / name, path):
            raise DataError(f"{shown(path / 'state.json')}: {shown(name, 80)} is no file of it")
        open_plain(path / name, TABLE_BYTES, "table").close()  # raises for what is no plain file
        yield path / name


# ----------------------------------------------------------------------------------------- texts


def read_passages(path: Path, rows: int, characters: int) -> tuple[Sequence[str], bool]:
    """The text of a file whole; or, where it is much longer than `rows` passages of `characters`,
    these passages, evenly spaced, each from the beginning of a word.

    Returns:
        the texts, and whether they are passages.
    """
    data = read_plain(path, JSON_BYTES, "text")
    try:
        text = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(path)} is not UTF-8 text: {error}") from None
    if len(text) <= rows * characters:
        return [text], False
    starts = [i * (len(text) - characters) // max(rows - 1, 1) for i in range(rows)]
    passages = [text[start : start + characters] for start in starts]
    return [
        p.partition(" ")[2] or p if s else p for s, p in zip(starts, passages, strict=True)
    ], True
