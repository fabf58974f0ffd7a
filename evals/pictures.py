"""Pictures of a benchmark table: decoded, checked, and kept under the hash of their content.

VLMEvalKit keeps a picture under its row's index and never looks at the table again, so a table with a new picture in
an old row is scored on the old picture. A name made from the content cannot be stale.
"""

import base64
import binascii
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from hipp_ext.errors import DataError
from hipp_ext.files import write_atomic

if TYPE_CHECKING:
    import pandas as pd

_LONGEST_REFERENCE = 64  # VLMEvalKit reads a shorter image cell as the index of the row whose picture it repeats


def picture_column(frame: "pd.DataFrame") -> str:
    """The column that pictures are read from: image (base64) if there is one, else image_path."""
    return "image" if "image" in frame else "image_path"


def store_pictures(path: Path, frame: "pd.DataFrame", folder: Path) -> tuple["pd.DataFrame", tuple[str, ...]]:
    """The rows that have a picture, with its absolute path in image_path, and the SHA-256 of each picture.

    Pictures from the column image are written to `folder`; those from image_path stay where they are, and a relative
    path starts at the TSV's folder.

    Raises:
        DataError: no row has a picture, or one cannot be decoded, or a row repeats one that is not there.
    """
    column = picture_column(frame)
    frame = frame.dropna(subset=[column]).reset_index(drop=True)
    if not len(frame):
        raise DataError(f"{path}: no row has a picture in the column {column}")
    cells = dict(zip(frame["index"].astype(str), frame[column].astype(str), strict=True))
    known: dict[str, tuple[str, str]] = {}
    found = []
    for index, cell in cells.items():
        where = f"{path}: row {index}"
        if column == "image" and len(cell) <= _LONGEST_REFERENCE:
            if len(cells.get(cell, "")) <= _LONGEST_REFERENCE:
                raise DataError(f"{where}: the image cell {cell!r} is neither a base64 picture nor the index of a "
                                "row that has one")  # fmt: skip
            cell = cells[cell]
        if cell not in known:
            known[cell] = _decode(where, cell, folder) if column == "image" else _open(where, cell, path.parent)
        found.append(known[cell])
    frame = frame.drop(columns=["image"], errors="ignore").assign(image_path=[file for file, _ in found])
    return frame, tuple(digest for _, digest in found)


def _decode(where: str, cell: str, folder: Path) -> tuple[str, str]:
    try:
        data = base64.b64decode(cell)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: the image is not valid base64: {error}") from None
    digest = hashlib.sha256(data).hexdigest()
    file = (folder / f"{digest[:32]}.png").resolve()
    png = _png(where, data)
    if not file.exists():
        write_atomic(file, png)
    return str(file), digest


def _open(where: str, cell: str, base: Path) -> tuple[str, str]:
    file = (base / cell).resolve()
    try:
        data = file.read_bytes()
    except OSError:
        raise DataError(f"{where}: there is no picture {file}") from None
    _png(where, data)
    return str(file), hashlib.sha256(data).hexdigest()


def _png(where: str, data: bytes) -> bytes:
    """The picture as the model will see it, 8-bit RGB, losslessly; compressed lightly, for speed."""
    from PIL import Image

    buffer = io.BytesIO()
    try:
        Image.open(io.BytesIO(data)).convert("RGB").save(buffer, "PNG", compress_level=1)
    except Exception as error:  # decoders of damaged pictures raise almost anything
        raise DataError(f"{where}: the image cannot be decoded: {error}") from None
    return buffer.getvalue()
