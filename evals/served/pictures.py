"""Pictures in requests: data URLs of the pixels that the model of a folder would see."""

import base64
import io
from functools import lru_cache

from hipp_ext.errors import DataError
from hipp_ext.files.untrusted import PICTURE_BYTES, read_plain, rgb_picture, shown


def data_url(picture: str | bytes) -> str:
    """The data URL of a picture: lossless PNG, 8-bit RGB.

    A file that is such a PNG already is sent as it is. Others are decoded here, because servers
    decode JPEG differently, and some turn pictures by their EXIF data or lay them on white.

    Args:
        picture: path of the file, or its bytes.

    Raises:
        DataError: the file cannot be read, or is no picture.
    """
    return _of_bytes(picture) if isinstance(picture, bytes) else _of_file(picture)


@lru_cache(maxsize=8)  # the questions about one picture follow each other
def _of_file(path: str) -> str:
    try:
        return _of_bytes(read_plain(path, PICTURE_BYTES, "picture"))
    except DataError as error:
        raise DataError(f"{shown(path)}: {error}") from None


def _of_bytes(data: bytes) -> str:
    picture = rgb_picture(data)  # also checks it
    if not _is_plain_png(data):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=1)
        data = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _is_plain_png(data: bytes) -> bool:
    """Whether every reader sees the same RGB pixels in it."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        return picture.format == "PNG" and picture.mode == "RGB" and not picture.info
