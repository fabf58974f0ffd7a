"""Writes a VLMEvalKit TSV with checked images. A killed run can continue, and the file is written
completely or not at all.

Reading and checking the images takes most of the time, so checked images are kept beside the
output, in .NAME.partial, until the TSV is written. The process that holds the lock on that file
writes; another process that writes the same TSV waits, and then finds it finished. NAME.json beside
the TSV describes its source.
"""

import base64
import contextlib
import csv
import functools
import hashlib
import io
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hipp_ext.errors import DataError, WriteError
from hipp_ext.evals.prediction_log import is_same
from hipp_ext.files import content_hash, new_file, require_new, write_atomic
from hipp_ext.files.temporaries import lock
from hipp_ext.files.untrusted import (
    PICTURE_BYTES,
    is_below,
    parse_json,
    read_json,
    read_plain,
    rgb_picture,
    shown,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image that is read later.

    Attributes:
        name: name of its place; rows with the same name share the image.
        stamp: size and time of the file that holds it, which show that the image may have changed.
        read: returns the bytes of the image file (JPEG, PNG, ...).
    """

    name: str
    stamp: tuple[int, int]
    read: Callable[[], bytes]


def file_pictures(folder: str | Path, names: Sequence[str]) -> list[Picture]:
    """The images with the given names in a folder; all files are looked up before the first is
    read.

    Raises:
        DataError: the folder does not exist, an image is missing or not a plain file, or a name
            leads out of the folder.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise DataError(f"there is no image folder {folder}")
    found: dict[str, Picture] = {}
    missing: list[str] = []
    for name in dict.fromkeys(names):
        if not is_below(root / name, root):
            raise DataError(f"the image name {name!r} leads out of the image folder {folder}")
        file = (root / name).resolve()
        try:
            status = file.stat()
        except OSError:
            missing.append(shown(name))
            continue
        if not stat.S_ISREG(status.st_mode):
            kind = "Is a directory" if stat.S_ISDIR(status.st_mode) else "It is a pipe or a device"
            raise DataError(
                f"the image {shown(name)} cannot be read: {kind}; a picture must be a plain file"
            )
        read = functools.partial(read_plain, file, PICTURE_BYTES, "picture")
        found[name] = Picture(name=name, stamp=(status.st_size, status.st_mtime_ns), read=read)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(missing) + len(found)} images are missing in {folder}, the "
            f"first is {missing[0]}. All are needed: without some of them it would be another "
            "data set"
        )
    return [found[name] for name in names]


def write_table(
    path: str | Path,
    rows: Sequence[Mapping[str, object]],
    pictures: Sequence[Picture],
    *,
    source: Mapping[str, object],
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write `rows` as a TSV with a column image after the index: base64, or the index of a row with
    the same image.

    After a killed run it continues with the images that are not yet checked. If the same file
    exists already, it does nothing.

    Args:
        path: path of the TSV. `path`.json is written beside it, with `source`, the numbers of rows
            and images, and the SHA-256.
        rows: rows with the same columns, of which the first is "index".
        pictures: image of each row.
        source: description of the source of the rows, as plain data.
        overwrite: replace an existing file.
        progress: show a progress bar on stderr.

    Returns:
        `path`.

    Raises:
        DataError: there are no rows, or an image cannot be read or decoded; the message names it.
        OutputExistsError: another file exists at `path`, and `overwrite` is False.
        WriteError: the disk is full, or the folder is not writable.
    """
    path = Path(path)
    if not rows:
        raise DataError(f"{path}: there is nothing to write, because there are no questions")
    _check_texts(rows)
    described = [list(map(dict, rows)), [(p.name, *p.stamp) for p in pictures], dict(source)]
    key = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
    partial = path.with_name(f".{path.name}.partial")
    if not _is_done(path, key):
        require_new(path, overwrite)
    elif not partial.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(partial) as kept:
        if not _is_done(path, key):  # another process made it while this one waited
            require_new(path, overwrite)
            distinct = list({picture.name: picture for picture in pictures}.values())
            _check_pictures(kept, key, distinct, path.name if progress else None)
            digest = hashlib.sha256()
            with new_file(path) as file:
                for line in _lines(rows, pictures, _checked(path, kept, distinct)):
                    file.write(line)
                    digest.update(line)
                numbers = {"rows": len(rows), "pictures": len(distinct)}
                record = {**source, **numbers, "sha256": digest.hexdigest(), "key": key}
                write_atomic(_record(path), json.dumps(record, indent=1) + "\n")
        partial.unlink()
    return path


def _check_texts(rows: Sequence[Mapping[str, object]]) -> None:
    """Refuse null bytes and halves of characters, which JSON can contain and a TSV cannot."""
    for row in rows:
        text = "\t".join(map(str, row.values()))
        if "\0" in text or text.encode("utf-8", "replace").decode() != text:
            index = shown(next(iter(row.values())))
            raise DataError(
                f"row {index}, {shown(text, 60)!r}, holds a null byte or half a character, which "
                "a TSV cannot"
            )


@contextlib.contextmanager
def _alone(partial: Path) -> Iterator[BinaryIO]:
    """Open and lock the partial file; waits for another process that holds the lock."""
    while True:
        try:
            handle = os.open(
                partial, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666
            )
        except OSError as error:
            raise WriteError(
                f"{partial} cannot be written: {error.strerror}. Choose another output"
            ) from error
        with os.fdopen(handle, "a+b") as file:
            if lock(file.fileno(), wait=False) is False:
                _log.info("another process writes %s; waiting for it", partial)
                lock(file.fileno(), wait=True)
            # Without locks, the lines of the file still name their images, so they can be checked.
            if not is_same(file, partial):  # its previous holder removed it
                continue
            try:
                yield file
            finally:
                if is_same(file, partial) and not os.fstat(file.fileno()).st_size:
                    partial.unlink()
            return


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _is_done(path: Path, key: str) -> bool:
    """Whether `path` is complete for this key; a record alone may be from a killed run."""
    if not path.is_file() or not _record(path).is_file():
        return False
    with contextlib.suppress(DataError, OSError):
        record = read_json(_record(path))
        return (
            isinstance(record, dict)
            and record.get("key") == key
            and record.get("sha256") == content_hash(path)
        )
    return False


def _check_pictures(
    kept: BinaryIO, key: str, pictures: Sequence[Picture], title: str | None
) -> None:
    """Complete the partial file: a line with the key, then one JSON line per image, in order."""
    from tqdm import tqdm

    done = _whole_lines(kept, key, pictures)
    with tqdm(pictures, desc=title, initial=done, disable=title is None) as bar:
        try:
            if not done:
                kept.write(_json_line(key=key))
            for picture in pictures[done:]:
                image = base64.b64encode(checked_bytes(picture)).decode()
                kept.write(_json_line(name=picture.name, image=image))
                kept.flush()
                bar.update()
        except OSError as error:
            raise WriteError(
                f"a picture could not be kept beside the output: {error.strerror}. Those before "
                "are kept; make room, and the same command again to continue"
            ) from error


def _whole_lines(kept: BinaryIO, key: str, pictures: Sequence[Picture]) -> int:
    """Number of images that the partial file holds, in order; an incomplete rest is removed."""
    kept.seek(0)
    whole, lines = 0, 0
    if kept.readline() == _json_line(key=key):
        for line, picture in zip(kept, pictures, strict=False):
            if not _holds(line, picture.name):
                break
            whole, lines = whole + len(line), lines + 1
        whole += len(_json_line(key=key)) if lines else 0
    kept.truncate(whole)
    kept.seek(0, os.SEEK_END)
    return lines


def _json_line(**entry: str) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def checked_bytes(picture: Picture) -> bytes:
    """The bytes of an image.

    Raises:
        DataError: it cannot be read or decoded; the message names it.
    """
    try:
        data = picture.read()
    except OSError as error:
        raise DataError(f"the image {shown(picture.name)} cannot be read: {error}") from None
    try:
        rgb_picture(data)
    except DataError as error:
        raise DataError(
            f"the image {shown(picture.name)} is broken, it cannot be decoded: {error}"
        ) from None
    return data


def _checked(path: Path, kept: BinaryIO, pictures: Sequence[Picture]) -> Iterator[str]:
    """The images in the partial file.

    Raises:
        DataError: another process wrote to it at the same time, on a file system without locks.
    """
    kept.seek(0)
    kept.readline()
    for picture in pictures:
        line = kept.readline()
        if not _holds(line, picture.name):
            raise DataError(
                f"the pictures kept for {path} were changed by another process at the same time. "
                "Run the command again"
            )
        yield parse_json(line, f"what is kept for {path}")["image"]


def _holds(line: bytes, name: str) -> bool:
    """Whether a line of the partial file is whole, and that of a picture."""
    return line.endswith(b'"}\n') and line.startswith(_json_line(name=name)[:-2] + b', "image": "')


def _lines(
    rows: Sequence[Mapping[str, object]], pictures: Sequence[Picture], checked: Iterator[str]
) -> Iterator[bytes]:
    """The lines of the TSV. Everything is quoted: a line break in a hint must not end the row."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
    first, *others = rows[0]
    writer.writerow([first, "image", *others])
    holders: dict[str, object] = {}
    for row, picture in zip(rows, pictures, strict=True):
        image = holders[picture.name] if picture.name in holders else next(checked)
        holders.setdefault(picture.name, row[first])
        writer.writerow([row[first], image, *(row[column] for column in others)])
        yield buffer.getvalue().encode()
        buffer.seek(0)
        buffer.truncate()
