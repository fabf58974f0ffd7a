"""Reads parquet files with images, such as the hub's ScienceQA, a few rows at a time, and refuses
damaged ones.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError, MissingExtraError
from hipp_ext.files.untrusted import TABLE_BYTES, open_plain, shown, the_only_one

_MAX_ROWS = 10**6  # a few bytes of a file can claim billions; ScienceQA has 21,208
_MAX_BYTES = 512 << 20  # unpacked size of the texts of a file, and of the images of one row group
_BATCH_ROWS = 16
# What pyarrow raises on damaged files, beside its own errors.
_DAMAGE = (OSError, ValueError, LookupError, OverflowError, MemoryError, TypeError)


class ParquetProblems:
    """A parquet file of problems, with the images of one row group in memory at a time.

    Args:
        path: path of the file.
        texts: names of the columns that it must have, besides "image".

    Raises:
        DataError: it is not a complete parquet file, lacks a column, or its unpacked size is too
            large. The methods raise it too, when they read more of the file.
        MissingExtraError: pyarrow is not installed.
    """

    def __init__(self, path: Path, texts: Sequence[str]):
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ModuleNotFoundError as error:
            raise MissingExtraError("pyarrow", "data") from error
        open_plain(path, TABLE_BYTES, "parquet file").close()
        self._path, self._texts, self._arrow_error = path, list(texts), pa.ArrowException
        with self._whole():
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            columns = self._file.schema_arrow.names
            rows = self._file.metadata.num_rows
        if lost := [name for name in (*texts, "image") if name not in columns]:
            raise DataError(
                f"{path} has no column {', '.join(lost)}; it has {shown(', '.join(columns), 500)}"
            )
        if not 0 <= rows <= _MAX_ROWS:
            raise DataError(f"{path} claims to have {rows:,} rows; at most {_MAX_ROWS:,} are read")
        self._group = functools.lru_cache(maxsize=1)(self._read_group)
        self._places: list[tuple[int, int]] = []  # row -> row group, row in the group

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Turn the many errors of pyarrow on damaged files into DataError."""
        try:
            yield
        except DataError:
            raise
        except (self._arrow_error, *_DAMAGE) as error:
            raise DataError(
                f"{self._path} is not a whole parquet file: {shown(error, 500)}"
            ) from None

    def problems(self) -> list[dict[str, Any]]:
        """All rows, without their images."""
        batches = self._batches(self._texts, range(self._file.num_row_groups))
        rows = [row for batch in batches for row in batch]
        self._check_rows(len(rows))
        return rows

    def _batches(self, columns: list[str], groups: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
        """Rows, a few at a time, so that a file is refused before its whole size is unpacked."""
        size = 0
        with self._whole():
            for group in groups:
                metadata = self._file.metadata.row_group(group)
                sizes = [
                    metadata.column(n).total_uncompressed_size
                    for n in range(metadata.num_columns)
                    if metadata.column(n).path_in_schema.partition(".")[0] in columns
                ]
                self._check_size(sum(sizes))
            rows = self._file.iter_batches(
                batch_size=_BATCH_ROWS, row_groups=list(groups), columns=columns, use_threads=False
            )
            for batch in rows:
                size += batch.nbytes
                self._check_size(size)
                yield batch.to_pylist()

    def _check_rows(self, found: int) -> None:
        if found != (claimed := self._file.metadata.num_rows):
            raise DataError(
                f"{self._path} is not a whole parquet file: it claims to have {claimed:,} rows, "
                f"and has {found:,}"
            )

    def _check_size(self, size: int) -> None:
        if not 0 <= size <= _MAX_BYTES:
            raise DataError(
                f"{self._path}: its texts, or the pictures of a row group, unpack to {size:,} "
                f"bytes; at most {_MAX_BYTES:,} are read. Write it with smaller row groups"
            )

    def rows_with_picture(self) -> list[int]:
        """The numbers of the rows that have an image; this reads the whole file once."""
        rows = []
        for group in range(self._file.num_row_groups):
            for place, cell in enumerate(self._group(group)):
                if cell is not None:
                    rows.append(len(self._places))
                self._places.append((group, place))
        self._check_rows(len(self._places))
        return rows

    def read(self, row: int) -> bytes:
        """The image of a row, as the bytes of its file."""
        group, place = self._places[row]
        data = self._group(group)[place]
        assert data is not None
        return data

    def _read_group(self, number: int) -> list[bytes | None]:
        cells = [row["image"] for batch in self._batches(["image"], [number]) for row in batch]
        return [None if cell is None else self._bytes(cell) for cell in cells]

    def _bytes(self, cell: Any) -> bytes:
        cell = the_only_one(cell, f"{self._path}: a cell of the column image")
        if not (isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes)):
            raise DataError(
                f"{self._path}: the column image does not hold pictures as bytes, but "
                f"{shown(cell, 60)}"
            )
        return cell["bytes"]
