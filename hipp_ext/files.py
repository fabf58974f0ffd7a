"""Writes that never leave half a result: a temporary name first, then a rename."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hipp_ext.errors import OutputExistsError


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    with new_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a temporary file, open for writing, that becomes `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def require_new(path: str | Path, overwrite: bool = False) -> None:
    """Raise OutputExistsError if `path` is there already, and not an empty folder, unless `overwrite`.

    What holds the working directory is never replaced.
    """
    path = Path(path)
    if path.resolve() in (here := Path.cwd(), *here.parents):
        raise OutputExistsError(f"{path} is the working directory, or holds it. Choose another name.")
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise OutputExistsError(f"{path} exists. Choose another name, or ask to overwrite it.")


@contextlib.contextmanager
def new_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` when the block ends without an error.

    Replacing an existing folder takes two renames. Killed between them, `path` is gone and both folders are whole beside it,
    under names that begin with a dot and the folder's name.

    Raises:
        OutputExistsError: `path` exists and is not an empty folder, and `overwrite` is False.
    """
    path = Path(path)
    require_new(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.rename(path, retired / "old")
            try:
                os.rename(temporary, path)
            except BaseException:
                os.rename(retired / "old", path)
                raise
            shutil.rmtree(retired)
        else:
            os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def content_hash(path: str | Path) -> str:
    """SHA-256 (hex) of a file, or of the names and contents of every file under a folder."""
    path, digest = Path(path), hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if file != path:
            digest.update(f"\0{file.relative_to(path).as_posix()}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
