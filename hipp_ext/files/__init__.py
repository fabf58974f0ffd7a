"""Writes that never leave half a result: a temporary name first, then a rename.

Links are written through and stay links. What a killed run leaves behind, the next write to the same output clears.
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

_SWEEP_EVERY = (
    1.0  # seconds between two looks for leftovers in one folder, which may hold thousands of files
)
_swept: dict[Path, float] = {}


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old file or the new one and nothing between.

    Raises:
        WriteError: as `new_file`.
    """
    with new_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a temporary file, open for writing, that becomes `path` when the block ends without an error.

    A link is followed, and a file that is there keeps its permissions. One that cannot be replaced (something is mounted on
    it, or its folder belongs to somebody else) is written in place, after the block: then a crash can cut it short.

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
                _take_over_permissions(target, descriptor)
            if replaced:
                os.replace(temporary, target)
            else:
                with temporary.open("rb") as finished, target.open("wb") as file:
                    shutil.copyfileobj(finished, file)
    finally:
        os.close(descriptor)
        clear(temporary)  # not there any more where all went well


def require_new(path: str | Path, overwrite: bool = False) -> None:
    """Raise unless a file or a folder can be written at `path`; for commands to call before the work.

    What a killed run left at `path` is cleared or completed first. What holds the working directory is never replaced.

    Raises:
        OutputExistsError: `path` is there already, and not an empty folder, and `overwrite` is False.
        WriteError: `path` cannot be written by this process.
    """
    target = target_of(path)
    if target in (here := Path.cwd(), *here.parents):
        raise OutputExistsError(
            f"{path} is the working directory, or holds it. Choose another name."
        )
    repair(target)
    if target.exists() and not overwrite and not (target.is_dir() and is_empty(target)):
        raise OutputExistsError(
            f"{path} exists. Choose another name, or ask to overwrite it (--overwrite, in Python overwrite=True)."
        )
    if target.is_dir():
        if not may_write(target):
            raise WriteError(
                f"{path} is a folder that you may not write to. Choose a place that you may write to."
            )
    elif target.exists():
        _check_file(path, target)
    else:
        _check_place(path, target)


def require_new_file(path: str | Path, overwrite: bool = False) -> None:
    """As `require_new`, for what will be a file: a folder of that name, though empty, is refused.

    Raises:
        OutputExistsError, WriteError: as `require_new`.
    """
    _check_file(path, target_of(path))
    require_new(path, overwrite)


@contextlib.contextmanager
def new_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    It stands beside `path`, which appears, or is replaced, by renaming. Where `path` is a link, a mounted volume, or a folder
    whose surroundings belong to somebody else, it stands inside: then the files are moved into place one by one, config.json
    last. Killed in the middle of either, the next write to `path` completes it; both folders are there until then.

    Raises:
        OutputExistsError: `path` exists and is not an empty folder, and `overwrite` is False. Where something appeared
            there during the block it stays as it is, and the message says where the new folder is.
        WriteError: the disk is full, or `path` cannot be written. What was there before is still there.
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


def _check_file(path: str | Path, target: Path) -> None:
    """Raise WriteError where `target`, if it is there, is no file that can be replaced or written."""
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
    """Raise WriteError where the folder that `target` would stand in cannot be written or made."""
    above = next(folder for folder in target.parents if os.path.lexists(folder))
    if not above.is_dir():
        raise WriteError(
            f"{path} cannot be written: {above} is not a folder. Choose another place."
        )
    if not may_write(above):
        raise WriteError(
            f"{path} cannot be written: {above} does not let you. Choose a place that you may write to."
        )
    if any(len(os.fsencode(name)) > 255 for name in target.parts):
        raise WriteError(
            f"{str(path)[:80]}... cannot be written: {os.strerror(errno.ENAMETOOLONG)}. Choose another name."
        )


def _take_over_permissions(target: Path, descriptor: int) -> None:
    old = target.stat()
    with contextlib.suppress(OSError, AttributeError):  # not every system has them
        os.fchown(
            descriptor, old.st_uid, old.st_gid
        )  # matters to root, who else would take the file away from its owner
    with contextlib.suppress(OSError, AttributeError):
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def _sweep_files(folder: Path) -> None:
    now = time.monotonic()
    if now - _swept.get(folder, -_SWEEP_EVERY) < _SWEEP_EVERY:
        return
    _swept[folder] = now
    for path in leftovers(folder, "."):
        if path.is_file() and MARK in path.name:
            clear(path)
