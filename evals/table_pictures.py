"""Images of a benchmark table: decoded, checked, and stored under the hash of their content.

VLMEvalKit stores an image under the index of its row and never reads it from the table again, so a
table with a new image in an old row is scored on the old image. A name made from the content is
always up to date.
"""

import base64
import binascii
import hashlib
import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from hipp_ext.errors import DataError
from hipp_ext.files import write_atomic
from hipp_ext.files.untrusted import (
    PICTURE_BYTES,
    is_below,
    read_plain,
    rgb_picture,
    shown,
    the_only_one,
)

if TYPE_CHECKING:
    import pandas as pd

# VLMEvalKit reads a shorter image cell as the index of another row with the same image.
MAX_REFERENCE = 64
# Mail and openssl break base64 into such lines; longer "lines" are several images.
_MAX_LINE = 76


def picture_column(frame: "pd.DataFrame") -> str:
    """The column with the images: image (base64) if there is one, else image_path."""
    return "image" if "image" in frame else "image_path"


def store_pictures(
    path: Path, frame: "pd.DataFrame", folder: Path
) -> tuple["pd.DataFrame", tuple[str, ...]]:
    """The rows that have an image, with its absolute path in image_path, and the SHA-256 of each
    image.

    Images from the column image are written to `folder`. Those from image_path stay where they are,
    in the TSV's folder or below it; relative paths start there. A cell with a list of one image is
    read as that image.

    Raises:
        DataError: no row has an image, a row has several, an image cannot be decoded, is too large
            or is in another folder, or a row repeats an image that does not exist. The message
            names the row.
    """
    column = picture_column(frame)
    frame = frame.dropna(subset=[column]).reset_index(drop=True)
    if not len(frame):
        raise DataError(f"{path}: no row has an image in the column {column}")
    indices = frame["index"].astype(str)
    wheres = [f"{path}: row {shown(index)}" for index in indices]
    given = [
        _text(the_only_one(cell, where), where)
        for cell, where in zip(frame[column].astype(str), wheres, strict=True)
    ]
    cells = dict(zip(indices, given, strict=True))
    known: dict[str, tuple[str, str]] = {}
    found = []
    for where, cell in zip(wheres, given, strict=True):
        if column == "image" and len(cell) <= MAX_REFERENCE:
            if len(cells.get(cell, "")) <= MAX_REFERENCE:
                raise DataError(
                    f"{where}: the image cell {cell!r} is neither a base64 picture nor the index "
                    "of a row that has one"
                )
            cell = cells[cell]
        if cell not in known:
            known[cell] = (
                _decode(where, cell, folder)
                if column == "image"
                else _open(where, cell, path.parent)
            )
        found.append(known[cell])
    frame = frame.drop(columns=["image"], errors="ignore").assign(
        image_path=[file for file, _ in found]
    )
    return frame, tuple(digest for _, digest in found)


def _text(cell: object, where: str) -> str:
    if not isinstance(cell, str):
        raise DataError(
            f"{where}: the picture's cell holds {shown(cell, 60)}, and a text is needed"
        )
    return cell


def _decode(where: str, cell: str, folder: Path) -> tuple[str, str]:
    data = _from_base64(where, cell)
    digest = hashlib.sha256(data).hexdigest()
    file = (folder / f"{digest[:32]}.png").resolve()
    png = _png(where, data)
    if not file.exists():
        write_atomic(file, png)
    return str(file), digest


def _from_base64(where: str, cell: str) -> bytes:
    """The bytes of one base64 text. Python's decoder skips other characters, and so reads the first
    of several.
    """
    lines = cell.split()
    text = "".join(lines)
    if (len(lines) > 1 and max(map(len, lines)) > _MAX_LINE) or not re.fullmatch(
        "[A-Za-z0-9+/]*={0,2}", text
    ):
        raise DataError(f"{where}: the image cannot be decoded: its cell is not one base64 text")
    if 3 * len(text) // 4 > PICTURE_BYTES:
        raise DataError(f"{where}: the image has more than {PICTURE_BYTES:,} bytes")
    try:
        return base64.b64decode(text)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: the image is not valid base64: {error}") from None


def _open(where: str, cell: str, base: Path) -> tuple[str, str]:
    file = base / cell
    if not is_below(file, base):
        raise DataError(
            f"{where}: the picture {shown(cell)} leads out of the folder of the table, {base}. "
            "Put images there, below it, or into the column image"
        )
    file = file.resolve()
    if not os.path.exists(file):  # False for a name that no file can have, where Path.exists raises
        raise DataError(f"{where}: there is no picture {shown(file)}")
    try:
        data = read_plain(file, PICTURE_BYTES, "picture")
    except DataError as error:
        raise DataError(f"{where}: there is no picture {shown(file)} to read: {error}") from None
    _png(where, data)
    return str(file), hashlib.sha256(data).hexdigest()


def _png(where: str, data: bytes) -> bytes:
    """The image as the model receives it: lossless PNG, 8-bit RGB, compressed lightly."""
    buffer = io.BytesIO()
    try:
        rgb_picture(data).save(buffer, "PNG", compress_level=1)
    except DataError as error:
        raise DataError(f"{where}: the image cannot be decoded: {error}") from None
    return buffer.getvalue()
