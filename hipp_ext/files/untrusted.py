"""What comes from strangers: files that are plain ones of a bearable size, JSON, pictures, and names for a terminal or a page.

A table or a results folder may be anybody's. A path in it may lead to a device that never ends, a picture may unpack to
gigabytes or be of a kind that Pillow hands to another program, JSON may be nested until the interpreter gives up. All of
that ends in a DataError here, before memory or time are spent.
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
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "GIF",
)  # Pillow decodes these itself; EPS, say, starts Ghostscript
_SCANS = 10  # those of a usual progressive JPEG, of the largest picture; each costs a pass over all of it
_NAME = 80  # longest name in a table or a figure [characters]
_LISTED = re.compile(r"'([^'\\]*(?:\\.[^'\\]*)*)'" r'|"([^"\\]*(?:\\.[^"\\]*)*)"')


def open_plain(path: str | Path, limit: int, what: str = "file") -> BinaryIO:
    """The file, open for reading in binary; nothing is opened that is not a plain file, since reading a pipe may never end.

    Args:
        path: of the file.
        limit: largest size [bytes].
        what: to call it in an error.

    Raises:
        DataError: there is no such file, it cannot be read, is a folder, pipe or device, or is larger than `limit`.
    """
    try:
        _check_plain(path, os.stat(path), limit, what)
        # O_NONBLOCK: should a pipe have taken the file's place meanwhile, opening it does not wait.
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
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a null byte in the path
        raise (
            error
            if isinstance(error, DataError)
            else DataError(f"{shown(path)} cannot be read: {error}")
        ) from None


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
    if len(data) > limit:  # it grew while it was read, or is one of /proc, whose size says nothing
        raise DataError(f"{shown(path)} has more than {limit:,} bytes, which a {what} may have")
    return data


def read_json(path: str | Path) -> Any:
    """The content of a JSON file, or a DataError that says what is wrong with it."""
    return parse_json(read_plain(path, what="JSON file"), shown(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """The value that a JSON text stands for.

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
    """The picture in the bytes of a file, decoded, as 8-bit RGB.

    Raises:
        DataError: it is none of `FORMATS`, is damaged, or has more than `PICTURE_PIXELS`; the message begins with "it".
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            pixels = picture.width * picture.height
            scans = max(1, data.count(b"\xff\xda")) if picture.format in ("JPEG", "MPO") else 1
            if pixels > PICTURE_PIXELS or pixels * scans > PICTURE_PIXELS * _SCANS:
                raise DataError(
                    f"it has {picture.width} x {picture.height} pixels{f' in {scans} scans' * (scans > 1)}; "
                    f"{PICTURE_PIXELS:,} pixels are decoded at most"
                )
            return picture.convert("RGB")
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"it is no picture of a kind that is read ({', '.join(FORMATS)})") from None
    except Exception as error:  # decoders of damaged pictures raise almost anything
        raise DataError(f"it cannot be decoded: {error}") from None


def read_picture(path: str | Path) -> "Image.Image":
    """The picture in a plain file, as `rgb_picture`. Errors as `open_plain` and `rgb_picture`."""
    data = read_plain(path, PICTURE_BYTES, "picture")
    try:
        return rgb_picture(data)
    except DataError as error:
        raise DataError(f"{shown(path)}: {error}") from None


def the_only_one(value: Any, where: str) -> Any:
    """`value`, or the member of a list of one. A text that spells a list, in JSON or as Python prints it, is such a list.

    VLMEvalKit writes rows with several pictures that way. To take the first one would ask about less than the row does.

    Raises:
        DataError: several, or none.
    """
    listed = _list_of(value)
    if listed is None:
        return value
    if len(listed) != 1:
        raise DataError(
            f"{where} has {len(listed) or 'no'} pictures in a list; questions about exactly one picture are asked. "
            "Leave the row out, or join its pictures into one"
        )
    return listed[0]


def _list_of(value: Any) -> list[Any] | None:
    """The members, or None for what is not a list."""
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
    """Whether a path lies in a folder, or below it, when every symbolic link is followed."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a null byte, or links in a ring
        return False


def shown(text: object, longest: int | None = None) -> str:
    """A text from a file or a path, for a message, a table or a figure: on one line, without what steers a terminal.

    Args:
        text: anything; its `str` is shown.
        longest: cut it after so many characters; None: not cut.
    """
    whole = str(text)
    if longest is not None and len(whole) > longest:
        whole = whole[: longest - 1] + "\u2026"
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else "\ufffd" for c in whole
    )


def short_name(text: object) -> str:
    """A name as `shown` shows it, of a length that fits a table."""
    return shown(text, _NAME)
