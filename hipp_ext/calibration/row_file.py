"""A file of the user's whose rows are read one by one, in any order, when they are needed.

One pass over the file notes where every row is, its size and its digest: 24 bytes a row. Of a
table whose rows name the pictures of others, the indices are held as well. A folder that `datasets`
saved stays mapped into memory.
"""

import array
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hipp_ext.calibration.records import arrow_row, read_arrow
from hipp_ext.calibration.spans import Parse, scan, with_picture
from hipp_ext.errors import CalibrationError
from hipp_ext.files.untrusted import open_plain, shown

FILE_BYTES = 1 << 42  # nothing of the file is held


class Rows(Protocol):
    """Rows of a file.

    Attributes:
        sizes: bytes of every row, as its content is stored.
        digests: 64 bits of every row's digest. They depend on the row alone, not on its place.
        digest: hex digest of all rows in their order.
    """

    @property
    def sizes(self) -> np.ndarray: ...

    @property
    def digests(self) -> np.ndarray: ...

    @property
    def digest(self) -> str: ...

    def read(self, number: int) -> Any:
        """The content of a row, from 0, or the DataError of reading it."""
        ...


def open_rows(path: str | Path, text_bytes: Callable[[], int]) -> Rows:
    """The rows of a file of any kind that `Calibration.from_file` reads.

    Args:
        path: the file, or a folder that `datasets` saved.
        text_bytes: function that returns the bytes of a row of plain text.

    Raises:
        CalibrationError: the file is of no kind that is read, or has no rows.
        DataError: it cannot be read, or is damaged.
    """
    path = Path(path)
    rows = _arrow_rows(path) if path.is_dir() else _file_rows(path, text_bytes)
    if not len(rows.sizes):
        raise CalibrationError(f"{shown(path)} has no rows.")
    return rows


@dataclass(frozen=True, kw_only=True, eq=False)
class RowFile:
    """The rows of a plain file; see `Rows`."""

    path: Path
    starts: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    digest: str
    parse: Parse

    def read(self, number: int) -> Any:
        row = self._parsed(number)
        if self.path.suffix.lower() != ".tsv" or not isinstance(row.get("image"), str):
            return row
        owner = self._pictures.get(row["image"])
        # A short cell that is the index of no row is a very small picture.
        return with_picture(row) if owner is None else row | {"image": self._parsed(owner)["image"]}

    def _parsed(self, number: int) -> Any:
        with open_plain(self.path, FILE_BYTES) as file:
            file.seek(int(self.starts[number]))
            data = file.read(int(self.sizes[number]))
        if _hashed(data) != int(self.digests[number]):
            raise CalibrationError(f"{shown(self.path)} was changed while it was read.")
        return self.parse(data)

    @functools.cached_property
    def _pictures(self) -> dict[str, int]:
        """Index of a row of a table -> its number, for rows with a picture."""
        rows = ((self._parsed(number), number) for number in range(len(self.sizes)))
        return {
            row["index"]: number
            for row, number in rows
            if isinstance(row.get("image"), dict) and row.get("index") is not None
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrowRows:
    """The rows of a folder that `datasets` saved; see `Rows`."""

    path: Path
    table: Any
    sizes: np.ndarray
    digests: np.ndarray
    digest: str

    def read(self, number: int) -> Any:
        return arrow_row(self.table, self.path, number)


def _file_rows(path: Path, text_bytes: Callable[[], int]) -> RowFile:
    starts = array.array("q")
    with (
        open_plain(path, FILE_BYTES, "file of rows") as file,
        open_plain(path, FILE_BYTES) as again,
    ):
        spans, parse = scan(path, file, text_bytes)

        def contents() -> Iterator[bytes]:
            for start, end in spans:
                starts.append(start)
                again.seek(start)
                yield again.read(end - start)

        known = _measured(contents())
    return RowFile(path=path, starts=np.array(starts), parse=parse, **known)


def _arrow_rows(path: Path) -> ArrowRows:
    table = read_arrow(path)
    contents = (
        json.dumps(arrow_row(table, path, i), default=_named_value, sort_keys=True).encode()
        for i in range(table.num_rows)
    )
    return ArrowRows(path=path, table=table, **_measured(contents))


def _measured(contents: Iterator[bytes]) -> dict[str, Any]:
    """Sizes and digests of rows."""
    whole, sizes, digests = hashlib.sha256(), array.array("q"), array.array("Q")
    for content in contents:
        digest = _hashed(content)
        whole.update(digest.to_bytes(8, "little"))
        sizes.append(len(content))
        digests.append(digest)
    return {"sizes": np.array(sizes), "digests": np.array(digests), "digest": whole.hexdigest()}


def _named_value(value: Any) -> str:
    """What stands for a value that JSON cannot hold, such as the bytes of a picture."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)


def _hashed(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
