"""Rows of a file -> batches that know which rows they have, and why other rows cannot be used."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hipp_ext.calibration import Batch
from hipp_ext.calibration.fitting import Row
from hipp_ext.calibration.reading import Reader
from hipp_ext.calibration.row_file import Rows
from hipp_ext.errors import DataError
from hipp_ext.files.untrusted import shown


class RowBatch(dict[str, Any]):
    """A batch, and the numbers of its rows in the file, from 1."""

    def __init__(self, batch: Batch, rows: Sequence[int]):
        super().__init__(batch)
        self.rows = tuple(rows)


@dataclass(frozen=True, kw_only=True)
class RowEncoder:
    """Encodes rows of a file, by their numbers from 0.

    Attributes:
        reader: fits rows to the processor.
        file: the rows.
        packed: put several rows behind each other.
        unusable: number of a row, from 1 -> why it cannot be used, of all that were tried.
    """

    reader: Reader
    file: Rows
    packed: bool
    unusable: dict[int, str] = field(default_factory=dict)

    def row(self, number: int) -> Row | None:
        """The row as what is encoded; None, if it cannot be used."""
        if number + 1 in self.unusable:
            return None
        try:
            row = self.reader.fit(self.file.read(number))
            if not row.ids and row.answer is None:
                raise DataError("it has no answer")
            if self.packed and row.sources:
                raise DataError("it has a picture, and packed rows are texts")
            return row
        except DataError as error:
            self.unusable[number + 1] = shown(error, 300)
            return None

    def batches(self, rows: Sequence[tuple[int, Row]]) -> list[Batch]:
        """Batches of rows: texts apart, and those with pictures."""
        return [
            RowBatch(self.reader.batch([rows[i][1] for i in own]), [rows[i][0] + 1 for i in own])
            for own in self.reader.groups([row for _, row in rows])
        ]

    def pack(self, rows: Sequence[tuple[int, Row]]) -> Batch:
        """Rows behind each other, as a batch of one row that is full or shorter."""
        parts = [self.reader.batch([row]) for _, row in rows]
        batch: dict[str, Any] = {
            name: torch.cat([part[name] for part in parts], 1)[:, : self.reader.length]
            for name in ("input_ids", "labels")
        }
        places = [torch.arange(part["input_ids"].shape[1]) for part in parts]
        # transformers finds the ends of the rows in the positions, where there is neither a mask
        # nor a cache of keys and values.
        batch["use_cache"] = False
        batch["position_ids"] = torch.cat(places)[None, : self.reader.length]
        return RowBatch(batch, [number + 1 for number, _ in rows])
