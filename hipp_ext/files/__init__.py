"""Writes that never leave half a result: a temporary name first, then a rename.

Links are followed and stay links. The next write to the same output removes what a killed run left.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hipp_ext.errors import OutputExistsError, WriteError
from hipp_ext.files.replacing import Swap, is_empty, repair
from hipp_ext.files.temporaries import (
    MARK,
    clear,
    is_mount,
    leftovers,
    make_temporary,
    may_replace,
    may_write,
    prefix_of,
    target_of,
    write_errors,
)

_SWEEP_SECONDS = 1.0  # between two searches of one folder, which may hold thousands of files
_swept: dict[Path, float] = {}


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Write `data` to `path`; a reader, or a crash, sees the old file or the new one.

    Raises:
        WriteError: as `new_file`.
    """
    with new_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a temporary file, open for writing, that becomes `path` if the block succeeds.

    A link is followed, and an existing file keeps its permissions. A file that cannot be replaced
    (something is mounted on it, or its folder belongs to another user) is written in place after
    the block; only then a crash can leave it incomplete.

    Raises:
        WriteError: the disk is full, or `path` cannot be written.
    """
    target = target_of(path)
    _check_file(path, target)
    replaced = not target.exists() or (may_replace(target) and not is_mount(target))
    folder = target.parent if replaced else Path(tempfile.gettempdir())
    with write_errors(path, folder):
        folder.mkdir(parents=True, exist_ok=True)
        _sweep_files(folder)
        temporary, descriptor = make_temporary(folder, prefix_of(target.name), is_file=True)
    try:
        with write_errors(path, temporary, target):
            with os.fdopen(os.dup(descriptor), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                _copy_permissions(target, descriptor)
            if replaced:
                os.replace(temporary, target)
            else:
                with temporary.open("rb") as finished, target.open("wb") as file:
                    shutil.copyfileobj(finished, file)
    finally:
        os.close(descriptor)
        clear(temporary)  # after success it no longer exists


def require_new(path: str | Path, overwrite: bool = False) -> None:
    """Raise unless a file or folder can be written at `path`; commands call this before the work.

    What a killed run left at `path` is first cleared or completed. The working directory and its
    parents are never replaced.

    Raises:
        OutputExistsError: `path` exists, is not an empty folder, and `overwrite` is False.
        WriteError: this process cannot write `path`.
    """
    target = target_of(path)
    if target in (here := Path.cwd(), *here.parents):
        raise OutputExistsError(
            f"{path} is the working directory, or holds it. Choose another name."
        )
    repair(target)
    if target.exists() and not overwrite and not (target.is_dir() and is_empty(target)):
        raise OutputExistsError(
            f"{path} exists. Choose another name, or ask to overwrite it (--overwrite, in Python "
            "overwrite=True)."
        )
    if target.is_dir():
        if not may_write(target):
            raise WriteError(
                f"{path} is a folder that you may not write to. Choose one that you may write to."
            )
    elif target.exists():
        _check_file(path, target)
    else:
        _check_place(path, target)


def require_new_file(path: str | Path, overwrite: bool = False) -> None:
    """As `require_new`, for a file: also an empty folder of that name is refused.

    Raises:
        OutputExistsError, WriteError: as `require_new`.
    """
    _check_file(path, target_of(path))
    require_new(path, overwrite)


@contextlib.contextmanager
def new_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` if the block succeeds.

    It is a sibling of `path`, which appears or is replaced by renaming. If `path` is a link, a
    mounted volume, or a folder in a place of another user, the temporary folder is inside it, and
    the files are moved one by one, config.json last. If either is interrupted by a kill, the next
    write to `path` completes it; both folders exist until then.

    Raises:
        OutputExistsError: `path` exists, is not an empty folder, and `overwrite` is False. What
            appeared there during the block stays, and the message names the new folder.
        WriteError: the disk is full, or `path` cannot be written. What was there before stays.
    """
    require_new(path, overwrite)
    target = target_of(path)
    inside = target.is_dir() and (
        Path(path).is_symlink() or is_mount(target) or not may_replace(target)
    )
    with write_errors(path, target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        swap = Swap(path, target, inside=inside)
    with swap, write_errors(path, swap.own, target):
        yield swap.new
        swap.commit(overwrite)


def content_hash(path: str | Path) -> str:
    """SHA-256 (hex) of a file, or of the names and contents of all files below a folder."""
    path, digest = Path(path), hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if file != path:
            digest.update(f"\0{file.relative_to(path).as_posix()}\0".encode())
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def _check_file(path: str | Path, target: Path) -> None:
    """Raise WriteError if `target` exists and is no file that can be replaced or written."""
    if not target.exists():
        return
    if not target.is_file():
        what = "a folder" if target.is_dir() else "a device or a pipe"
        raise WriteError(f"{path} is {what}; a file is to be written there. Choose another name.")
    if not may_replace(target) and not os.access(target, os.W_OK):
        raise WriteError(
            f"{path} is a file that you may not write to. Choose a place that you may write to."
        )


def _check_place(path: str | Path, target: Path) -> None:
    """Raise WriteError if the folder of `target` cannot be written or created."""
    above = next(folder for folder in target.parents if os.path.lexists(folder))
    if not above.is_dir():
        raise WriteError(
            f"{path} cannot be written: {above} is not a folder. Choose another place."
        )
    if not may_write(above):
        raise WriteError(
            f"{path} cannot be written: {above} does not let you. Choose a place that you may "
            "write to."
        )
    if any(len(os.fsencode(name)) > 255 for name in target.parts):
        raise WriteError(
            f"{str(path)[:80]}... cannot be written: {os.strerror(errno.ENAMETOOLONG)}. Choose "
            "another name."
        )


def _copy_permissions(target: Path, descriptor: int) -> None:
    old = target.stat()
    with contextlib.suppress(OSError, AttributeError):  # not every system has them
        os.fchown(descriptor, old.st_uid, old.st_gid)  # root would take the file from its owner
    with contextlib.suppress(OSError, AttributeError):
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def _sweep_files(folder: Path) -> None:
    now = time.monotonic()
    if now - _swept.get(folder, -_SWEEP_SECONDS) < _SWEEP_SECONDS:
        return
    _swept[folder] = now
    for path in leftovers(folder, "."):
        if path.is_file() and MARK in path.name:
            clear(path)
