"""What a file holds for the calibration of a model: rows by kind, tokens, pictures, and every row
that is left out. `hipp doctor --calibration` shows it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hipp_ext.calibration.batches import check_batch
from hipp_ext.calibration.fitting import Row
from hipp_ext.calibration.pictures import UnreadPictureError
from hipp_ext.calibration.reading import ROWS, Reader, listed, make_reader
from hipp_ext.calibration.row_file import open_rows
from hipp_ext.errors import CalibrationError, DataError
from hipp_ext.files.untrusted import shown

BATCH = 8  # rows, as `Calibration.from_file` takes them


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What `Calibration.from_file` would make of a file.

    Attributes:
        file: the file.
        rows: rows of the whole file; None: it is plain text, or cannot be read.
        usable: rows that were read and can be used.
        kinds: kind of row -> usable rows of it.
        tokens: tokens of all usable rows, those of their pictures included.
        longest: tokens of the longest of them.
        pictures: pictures of the usable rows.
        unread_pictures: rows that are left out because a picture of theirs cannot be read.
        left_out: a line for each row that was read and is left out: its number, from 1, and why.
        problem: why the file cannot be the calibration of the model; None: it can.
    """

    file: str
    rows: int | None = None
    usable: int = 0
    kinds: Mapping[str, int]
    tokens: int = 0
    longest: int = 0
    pictures: int = 0
    unread_pictures: int = 0
    left_out: Sequence[str] = ()
    problem: str | None = None


def survey(
    model: nn.Module,
    processor: Any,
    path: str | Path,
    *,
    image_folder: str | Path | None = None,
    rows: int = ROWS,
    sequence_length: int | None = None,
) -> Survey:
    """What a file holds for `model`, by the readers of `Calibration.from_file`, whose arguments it
    takes.

    Args:
        model: the model; it may be on the meta device.
        processor: its processor or tokenizer; None: there is none, which is a problem of the file.
        path: file, or a folder that `datasets` saved.
        image_folder: folder that paths of pictures start from.
        rows: number of rows to read, evenly spaced over the file.
        sequence_length: tokens after which a row is cut.

    Raises:
        DataError: there is nothing at `path`.
    """
    file = Path(path)
    if not file.exists():
        raise DataError(f"There is no file {shown(file)}.")
    found: dict[str, Any] = {"file": str(path), "kinds": {}}
    try:
        if processor is None:
            raise CalibrationError("the model's folder has no processor or tokenizer to read it.")
        reader = make_reader(
            file,
            processor,
            image_folder=image_folder,
            sequence_length=sequence_length,
            batch_size=BATCH,
        )
        fitting, refused = reader.examine(file, rows)
        found |= _counted(fitting, refused)
        if file.suffix.lower() != ".txt":
            found["rows"] = len(open_rows(file, lambda: 1).sizes)
        if not fitting:
            raise CalibrationError(f"none of its rows can be used: {listed(found['left_out'])}")
        _check_batches(model, reader, fitting)
    except (CalibrationError, DataError) as error:
        found["problem"] = str(error)
    return Survey(**found)


def _counted(fitting: Sequence[Row], refused: Sequence[tuple[int, DataError]]) -> dict[str, Any]:
    return {
        "usable": len(fitting),
        "kinds": dict(Counter(_kind(row) for row in fitting).most_common()),
        "tokens": sum(row.tokens for row in fitting),
        "longest": max((row.tokens for row in fitting), default=0),
        "pictures": sum(len(row.sources) for row in fitting),
        "unread_pictures": sum(isinstance(error, UnreadPictureError) for _, error in refused),
        "left_out": [f"row {number}: {shown(error, 300)}" for number, error in refused],
    }


def _kind(row: Row) -> str:
    is_text, has_pictures, is_answered = row.kind
    if is_text:
        return "texts"
    return f"chats with{'' if has_pictures else 'out'} pictures" + ", unanswered" * (
        not is_answered
    )


def _check_batches(model: nn.Module, reader: Reader, rows: Sequence[Row]) -> None:
    """Raise CalibrationError unless the batches of the rows, one after the other, fit the model."""
    for number, own in enumerate(reader.groups(rows)):
        check_batch(model, reader.batch([rows[i] for i in own]), number)
