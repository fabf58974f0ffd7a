"""Rows and pictures -> a VLMEvalKit TSV: every picture checked, a killed run goes on, the file appears whole or not at all.

Reading and checking the pictures takes the time, so what was checked is kept beside the output, in .NAME.partial, until
the TSV is there. Beside the TSV stays NAME.json, which says what it was made from.
"""

import base64
import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError
from hipp_ext.files import content_hash, new_file, require_new, write_atomic


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
        DataError: there is no such folder, a picture is missing, or a name leads out of the folder.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise DataError(f"there is no image folder {folder}")
    found: dict[str, Picture] = {}
    missing: list[str] = []
    for name in dict.fromkeys(names):
        file = (root / name).resolve()
        if not file.is_relative_to(root):
            raise DataError(f"the image name {name!r} leads out of the image folder {folder}")
        try:
            status = file.stat()
        except OSError:
            missing.append(name)
            continue
        found[name] = Picture(name=name, stamp=(status.st_size, status.st_mtime_ns), read=file.read_bytes)
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
    """
    path = Path(path)
    if not rows:
        raise DataError(f"{path}: there is nothing to write, not one question was made")
    described = [list(map(dict, rows)), [(p.name, *p.stamp) for p in pictures], dict(source)]
    key = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
    if _is_done(path, key):
        return path
    require_new(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    distinct = list({picture.name: picture for picture in pictures}.values())
    partial = path.with_name(f".{path.name}.partial")
    _check_pictures(partial, key, distinct, path.name if progress else None)
    with new_file(path) as file, contextlib.closing(_checked(partial)) as checked:
        digest = hashlib.sha256()
        for line in _lines(rows, [picture.name for picture in pictures], checked):
            file.write(line)
            digest.update(line)
        record = {**source, "rows": len(rows), "pictures": len(distinct), "sha256": digest.hexdigest(), "key": key}
        write_atomic(_record(path), json.dumps(record, indent=1) + "\n")
    partial.unlink()
    return path


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _is_done(path: Path, key: str) -> bool:
    """Whether `path` is the whole file that this key makes; the record alone may be from a run that was killed."""
    if not path.is_file() or not _record(path).is_file():
        return False
    with contextlib.suppress(ValueError, OSError):
        record = json.loads(_record(path).read_text(encoding="utf-8"))
        return isinstance(record, dict) and record.get("key") == key and record.get("sha256") == content_hash(path)
    return False


def _check_pictures(partial: Path, key: str, pictures: Sequence[Picture], title: str | None) -> None:
    """Bring the partial file to hold every picture, in order: one JSON line each, after a line with the key."""
    from tqdm import tqdm

    done = _whole_lines(partial, key)
    with partial.open("ab") as file, tqdm(pictures, desc=title, initial=done, disable=title is None) as bar:
        if file.tell() == 0:
            file.write(_json_line({"key": key}))
        for picture in pictures[done:]:
            file.write(_json_line({"image": _checked_base64(picture)}))
            file.flush()
            bar.update()


def _whole_lines(partial: Path, key: str) -> int:
    """How many pictures the partial file holds; what a crash cut off is removed, and all of it if it has another key."""
    if not partial.exists():
        return 0
    whole, lines = 0, 0
    with partial.open("rb") as file:
        if file.readline() == _json_line({"key": key}):
            whole = file.tell()
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole, lines = whole + len(line), lines + 1
    os.truncate(partial, whole)
    return lines


def _json_line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _checked_base64(picture: Picture) -> str:
    from PIL import Image

    try:
        data = picture.read()
    except OSError as error:
        raise DataError(f"the image {picture.name} cannot be read: {error}") from None
    try:
        Image.open(io.BytesIO(data)).convert("RGB")
    except Exception as error:  # decoders of damaged pictures raise almost anything
        raise DataError(f"the image {picture.name} is broken, it cannot be decoded: {error}") from None
    return base64.b64encode(data).decode()


def _checked(partial: Path) -> Generator[str, None, None]:
    with partial.open("rb") as file:
        file.readline()
        for line in file:
            yield json.loads(line)["image"]


def _lines(rows: Sequence[Mapping[str, object]], names: Sequence[str], checked: Iterator[str]) -> Iterator[bytes]:
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
