"""Rows and pictures -> a VLMEvalKit TSV: every picture checked, a killed run goes on, the file appears whole or not at all.

Reading and checking the pictures takes the time, so what was checked is kept beside the output, in .NAME.partial, until
the TSV is there. Who holds the lock on that file writes; another process that is to write the same TSV waits, and then finds
it made. Beside the TSV stays NAME.json, which says what it was made from.
"""

import base64
import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import stat
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hipp_ext.errors import DataError, WriteError
from hipp_ext.files import content_hash, new_file, require_new, write_atomic
from hipp_ext.files.untrusted import (
    PICTURE_BYTES,
    is_below,
    parse_json,
    read_json,
    read_plain,
    rgb_picture,
    shown,
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Where a picture comes from; it is read when its turn comes.

    Attributes:
        name: says where it is; two rows of one name share the picture.
        stamp: changes when the picture may have changed: size and time of the file that holds it.
        read: gives the bytes of the picture file (JPEG, PNG, ...).
    """

    name: str
    stamp: tuple[int, int]
    read: Callable[[], bytes]


def file_pictures(folder: str | Path, names: Sequence[str]) -> list[Picture]:
    """The picture of each name in a folder; looks at every file before the first is read.

    Raises:
        DataError: there is no such folder, a picture is missing or not a plain file, or a name leads out of the folder.
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
            f"{len(missing)} of {len(missing) + len(found)} images are missing in {folder}, the first is {missing[0]}. "
            "All are needed: leaving some out would make another data set"
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
    """The TSV of `rows`, with a column image after the index: base64, or the index of the row with the same picture.

    Called again after it was killed, it goes on with the pictures that are not checked yet; called again for what is
    there already, it does nothing.

    Args:
        path: the TSV; beside it comes `path`.json with `source`, the number of rows and pictures, and the SHA-256.
        rows: all with the same columns, of which the first is "index".
        pictures: one per row.
        source: what the rows were made from, as plain data.
        overwrite: replace a file that is there.
        progress: show a progress bar on stderr.

    Raises:
        DataError: no rows, or a picture cannot be read or decoded; the message names it.
        OutputExistsError: another file is at `path`, and `overwrite` is False.
        WriteError: the disk is full, or the folder is not writable.
    """
    path = Path(path)
    if not rows:
        raise DataError(f"{path}: there is nothing to write, not one question was made")
    _check_texts(rows)
    described = [list(map(dict, rows)), [(p.name, *p.stamp) for p in pictures], dict(source)]
    key = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
    partial = path.with_name(f".{path.name}.partial")
    if _is_done(path, key) and not partial.exists():
        return path
    if not _is_done(path, key):
        require_new(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(partial, progress) as kept:
        if not _is_done(path, key):  # another process made it while this one waited
            require_new(path, overwrite)
            distinct = list({picture.name: picture for picture in pictures}.values())
            _check_pictures(kept, key, distinct, path.name if progress else None)
            _write(
                path,
                rows,
                pictures,
                kept,
                {**source, "rows": len(rows), "pictures": len(distinct)},
                key,
            )
        partial.unlink()
    return path


def _check_texts(rows: Sequence[Mapping[str, object]]) -> None:
    """Refuse what a TSV cannot hold: null bytes, and halves of characters, which JSON can spell."""
    for row in rows:
        text = "\t".join(map(str, row.values()))
        if "\0" in text or text.encode("utf-8", "replace").decode() != text:
            index = shown(next(iter(row.values())))
            raise DataError(
                f"row {index}, {shown(text, 60)!r}, holds a null byte or half a character, which a TSV cannot"
            )


def _write(
    path: Path,
    rows: Sequence[Mapping[str, object]],
    pictures: Sequence[Picture],
    kept: BinaryIO,
    record: Mapping[str, object],
    key: str,
) -> None:
    with new_file(path) as file, contextlib.closing(_checked(path, kept, pictures)) as checked:
        digest = hashlib.sha256()
        for line in _lines(rows, [picture.name for picture in pictures], checked):
            file.write(line)
            digest.update(line)
        record = {**record, "sha256": digest.hexdigest(), "key": key}
        write_atomic(_record(path), json.dumps(record, indent=1) + "\n")


@contextlib.contextmanager
def _alone(partial: Path, progress: bool) -> Iterator[BinaryIO]:
    """The partial file, open for reading and appending, while no other process has it; waits for one that does."""
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
            _lock(file, partial if progress else None)
            if not _is_same(file, partial):  # who had it has ended, and removed it
                continue
            try:
                yield file
            finally:
                if _is_same(file, partial) and not os.fstat(file.fileno()).st_size:
                    partial.unlink()
            return


def _lock(file: BinaryIO, told: Path | None) -> None:
    """Wait for the lock, and say so of the file `told`. The system gives it back however a process ends.

    Where there is no lock, the lines of the file still name their pictures.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if told is not None:
            print(f"another process writes {told}; waiting for it", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return


def _is_same(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _is_done(path: Path, key: str) -> bool:
    """Whether `path` is the whole file that this key makes; the record alone may be from a run that was killed."""
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
    """Bring the partial file to hold every picture, in order: one JSON line each, after a line with the key."""
    from tqdm import tqdm

    done = _whole_lines(kept, key, pictures)
    with tqdm(pictures, desc=title, initial=done, disable=title is None) as bar:
        if not done:
            _append(kept, _json_line(key=key))
        for picture in pictures[done:]:
            _append(kept, _json_line(name=picture.name, image=_checked_base64(picture)))
            bar.update()


def _append(kept: BinaryIO, line: bytes) -> None:
    try:
        kept.write(line)
        kept.flush()
    except OSError as error:
        raise WriteError(
            f"a picture could not be kept beside the output: {error.strerror}. Those before are kept; make room, and the same "
            "command goes on from there"
        ) from error


def _whole_lines(kept: BinaryIO, key: str, pictures: Sequence[Picture]) -> int:
    """How many of the pictures the partial file holds, in order; what follows them is removed, as what a crash cut off."""
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


def _checked_base64(picture: Picture) -> str:
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
    return base64.b64encode(data).decode()


def _checked(path: Path, kept: BinaryIO, pictures: Sequence[Picture]) -> Generator[str, None, None]:
    """What the partial file holds, each distinct picture once.

    Raises:
        DataError: another process wrote to it at the same time, on a file system without locks.
    """
    kept.seek(0)
    kept.readline()
    for name in dict.fromkeys(picture.name for picture in pictures):
        line = kept.readline()
        if not _holds(line, name):
            raise DataError(
                f"the pictures kept for {path} were changed by another process at the same time. Run the command again"
            )
        yield parse_json(line, f"what is kept for {path}")["image"]


def _holds(line: bytes, name: str) -> bool:
    """Whether a line of the partial file is whole, and that of a picture."""
    return line.endswith(b'"}\n') and line.startswith(_json_line(name=name)[:-2] + b', "image": "')


def _lines(
    rows: Sequence[Mapping[str, object]], names: Sequence[str], checked: Iterator[str]
) -> Iterator[bytes]:
    """The lines of the TSV. Everything is quoted: a line break in a hint must not end the row."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
    first, *others = rows[0]
    writer.writerow([first, "image", *others])
    holders: dict[str, object] = {}
    for row, name in zip(rows, names, strict=True):
        image = holders[name] if name in holders else next(checked)
        holders.setdefault(name, row[first])
        writer.writerow([row[first], image, *(row[column] for column in others)])
        yield buffer.getvalue().encode()
        buffer.seek(0)
        buffer.truncate()
