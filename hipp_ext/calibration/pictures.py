"""Where a row says its picture is -> the picture, decoded and checked.

Rows may be anybody's. A picture is read from the row itself or from a file below the image folder;
nothing is fetched.
"""

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipp_ext.errors import DataError
from hipp_ext.files.untrusted import (
    PICTURE_BYTES,
    is_below,
    read_picture,
    rgb_picture,
    shown,
    the_only_one,
)

if TYPE_CHECKING:
    from PIL import Image


class UnreadPictureError(DataError):
    """A picture of a row is missing, elsewhere, or damaged."""


DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


def read_source(source: Any, folder: Path) -> "Image.Image":
    """The picture that a source names, RGB.

    Args:
        source: a path below `folder`, a data: URL, {"url": either}, {"base64": text}, or
            {"bytes": ..., "path": ...} as `datasets` stores pictures.
        folder: where pictures are.

    Raises:
        DataError: there is no such picture, it is elsewhere, or it cannot be decoded.
    """
    if isinstance(source, Mapping):
        if isinstance(source.get("bytes"), bytes):
            return rgb_picture(source["bytes"])
        if isinstance(source.get("base64"), str):
            return _decoded(the_only_one(source["base64"], "it"))
        source = source.get("url") or source.get("path")
    if not isinstance(source, str):
        raise DataError(f"its picture is a {type(source).__name__}, and a path is needed")
    if beginning := DATA_URL.match(source):
        return _decoded(source[beginning.end() :])
    if re.match(r"[a-z][a-z0-9+.-]+:", source, re.IGNORECASE):
        raise DataError(
            f"its picture is at {shown(source, 80)}, and nothing is fetched: download it, and give "
            "its path below the image folder"
        )
    if not is_below(folder / source, folder):
        raise DataError(f"its picture {shown(source, 80)} is not below the image folder")
    return read_picture(folder / source)


def _decoded(text: Any) -> "Image.Image":
    if not isinstance(text, str):
        raise DataError("its picture is no base64 text")
    if 3 * len(text) // 4 > PICTURE_BYTES:
        raise DataError(f"its picture has more than {PICTURE_BYTES:,} bytes")
    try:
        return rgb_picture(base64.b64decode("".join(text.split()), validate=True))
    except DataError as error:
        raise DataError(f"its picture cannot be read: {error}") from None
    except ValueError:
        raise DataError("its picture is no base64 text") from None
