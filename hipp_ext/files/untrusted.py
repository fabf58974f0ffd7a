"""Untrusted input: files, JSON, pictures, and names that are printed.

A table or a results folder can come from anybody. A path in it may lead to an endless device, a
picture may unpack to gigabytes or have a format that Pillow passes to another program, JSON may be
nested too deeply for the interpreter. All of this is a DataError here, before it costs memory or
time.
"""

import io
import json
import os
import re
import stat
import unicodedata
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hipp_ext.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

TABLE_BYTES = 4 << 30  # VLMEvalKit's largest benchmark files are smaller
JSON_BYTES = 1 << 30  # COCO's largest instance file is half of it
PICTURE_BYTES = 256 << 20
PICTURE_PIXELS = 1 << 26  # twice an 8K screen
# Pillow decodes these itself; EPS, for example, starts Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
_SCANS = 10  # of a usual progressive JPEG of the largest size; each is a pass over all pixels
MAX_COMMAND = 10_000  # longest command line that a result keeps [characters]
_NAME = 80  # longest name in a table or a figure [characters]
_LISTED = re.compile(r"'([^'\\]*(?:\\.[^'\\]*)*)'" r'|"([^"\\]*(?:\\.[^"\\]*)*)"')


def open_plain(path: str | Path, limit: int, what: str = "file") -> BinaryIO:
    """A plain file, open for reading in binary. Nothing else is opened: a pipe may never end.

    Args:
        path: path of the file.
        limit: largest size [bytes].
        what: name of the kind of file in errors.

    Raises:
        DataError: the file does not exist, cannot be read, is a folder, pipe or device, or is
            larger than `limit`.
    """
    try:
        _check_plain(path, os.stat(path), limit, what)
        # O_NONBLOCK: if a pipe has replaced the file in the meantime, opening it does not wait.
        handle = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )
        file = os.fdopen(handle, "rb")
        try:
            _check_plain(path, os.fstat(handle), limit, what)
        except BaseException:
            file.close()
            raise
        return file
    except DataError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{shown(path)} cannot be read: {reason}") from None


def _check_plain(path: str | Path, status: os.stat_result, limit: int, what: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"{shown(path)} is a folder, and a {what} is needed")
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{shown(path)} is a pipe or a device; a {what} must be a plain file")
    if status.st_size > limit:
        raise DataError(f"{shown(path)} has {status.st_size:,} bytes; a {what} may have {limit:,}")


def read_plain(path: str | Path, limit: int = JSON_BYTES, what: str = "file") -> bytes:
    """The bytes of a plain file. Errors as `open_plain`."""
    with open_plain(path, limit, what) as file:
        data = file.read(limit + 1)
    if len(data) > limit:  # it grew while it was read, or is in /proc, where sizes are 0
        raise DataError(f"{shown(path)} has more than {limit:,} bytes, which a {what} may have")
    return data


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Errors as `read_plain` and `parse_json`."""
    return parse_json(read_plain(path, what="JSON file"), shown(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        DataError: it is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError:
        raise DataError(f"{where} is not valid JSON for us: it is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON: {error}") from None


def rgb_picture(data: bytes) -> "Image.Image":
    """The picture in the bytes of a file, decoded to 8-bit RGB.

    Raises:
        DataError: the picture has none of `FORMATS`, is damaged, or has more than
            `PICTURE_PIXELS`. The message begins with "it".
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            pixels = picture.width * picture.height
            scans = max(1, data.count(b"\xff\xda")) if picture.format in ("JPEG", "MPO") else 1
            if pixels > PICTURE_PIXELS or pixels * scans > PICTURE_PIXELS * _SCANS:
                passes = f" in {scans} scans" if scans > 1 else ""
                raise DataError(
                    f"it has {picture.width} x {picture.height} pixels{passes}; "
                    f"{PICTURE_PIXELS:,} pixels are decoded at most"
                )
            return picture.convert("RGB")
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"it is no picture of a kind that is read ({', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise many types for damaged pictures
        raise DataError(f"it cannot be decoded: {error}") from None


def read_picture(path: str | Path) -> "Image.Image":
    """The picture in a plain file. Errors as `open_plain` and `rgb_picture`."""
    data = read_plain(path, PICTURE_BYTES, "picture")
    try:
        return rgb_picture(data)
    except DataError as error:
        raise DataError(f"{shown(path)}: {error}") from None


def the_only_one(value: Any, where: str) -> Any:
    """`value`, or the only member of a list; a list may also be text, in JSON or Python's repr.

    VLMEvalKit writes rows with several pictures this way. The first picture alone would not answer
    the question of such a row.

    Raises:
        DataError: the list has several members, or none.
    """
    listed = _list_of(value)
    if listed is None:
        return value
    if len(listed) != 1:
        raise DataError(
            f"{where} has {len(listed) or 'no'} pictures in a list; questions about exactly one "
            "picture are asked. Leave the row out, or join its pictures into one"
        )
    return listed[0]


def _list_of(value: Any) -> list[Any] | None:
    """The members of a list, or None for other values."""
    if isinstance(value, list | tuple):
        return list(value)
    if (
        not isinstance(value, str)
        or not (text := value.strip()).startswith("[")
        or not text.endswith("]")
    ):
        return None
    try:
        return list(parse_json(text, "cell"))
    except DataError:
        pass
    found = _LISTED.findall(text[1:-1])
    if _LISTED.sub("", text[1:-1]).translate(str.maketrans("", "", ", \t\r\n")):
        return None  # not a list of quoted texts
    return [re.sub(r"\\(.)", r"\1", one or other) for one, other in found]


def is_below(path: Path, folder: Path) -> bool:
    """Whether a path is in a folder or below it after following all symbolic links."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a null byte, or a circle of links
        return False


def shown(text: object, longest: int | None = None) -> str:
    """Text for a message, table or figure: on one line, without control characters.

    Args:
        text: any object; its `str` is used.
        longest: largest number of characters; longer text is cut. None: no limit.
    """
    whole = str(text)
    if longest is not None and len(whole) > longest:
        whole = whole[: longest - 1] + "\u2026"
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else "\ufffd" for c in whole
    )


def short_name(text: object) -> str:
    """A name as `shown` returns it, cut to a length that fits a table."""
    return shown(text, _NAME)
