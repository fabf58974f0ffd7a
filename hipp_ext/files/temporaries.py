"""Temporary files and folders of writes in progress: where they stand, who holds them, and how a later run clears them.

A write first makes a temporary `.NAME.hipp-XXXX` beside its output NAME, and holds a lock on it for as long as its process
lives. The lock ends with the process, however it ends, so what nobody holds is left over from a run that was killed. Where
the file system has no locks nothing can be told, and nothing is removed.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from hipp_ext.errors import HippError, WriteError

try:
    import fcntl
except ImportError:  # not on this system: leftovers stay
    fcntl = None  # type: ignore[assignment]

MARK = ".hipp-"
LOCK = "lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)
_REMEDY = {
    **dict.fromkeys(FULL, "Free some space there, or choose another place"),
    **dict.fromkeys(NOT_OURS, "Choose a place that you may write to"),
}
_LONGEST = 120  # bytes of an output's name that go into a temporary name; file systems allow 255


def target_of(path: str | Path) -> Path:
    """Where a write to `path` goes: links are followed, the last one too, whether or not it leads to something yet.

    Raises:
        WriteError: no path at all, or links that lead in a circle.
    """
    try:
        target = Path(os.path.realpath(path))
        os.lstat(target)
    except FileNotFoundError:
        return target
    except (OSError, ValueError) as error:
        raise WriteError(
            f"{str(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}."
        ) from None
    if target.is_symlink():
        raise WriteError(f"{path} is a link that leads to itself. Choose another place.")
    return target


def may_write(folder: Path) -> bool:
    """Whether this process may make and remove entries in `folder`."""
    effective = os.access in os.supports_effective_ids
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=effective)


def may_replace(path: Path) -> bool:
    """Whether this process may put something else in the place of `path`, an entry of a folder."""
    if not may_write(path.parent):
        return False
    parent = path.parent.stat()
    owners = (0, parent.st_uid, path.lstat().st_uid)
    return (
        not parent.st_mode & stat.S_ISVTX or _user() in owners
    )  # in folders like /tmp, only what is one's own


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def is_mount(path: Path) -> bool:
    """Whether something is mounted on `path`; also a folder of the same disk, which `os.path.ismount` does not see."""
    if os.path.ismount(path):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    points = (
        re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), line.split()[4])
        for line in lines
    )
    return os.fsencode(path) in points


def prefix_of(name: str) -> str:
    """How the temporaries of an output called `name` begin."""
    if len(os.fsencode(name)) > _LONGEST:
        name = name[: _LONGEST // 4] + hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f".{name}{MARK}"


def make_temporary(folder: Path, prefix: str, *, is_file: bool) -> tuple[Path, int]:
    """(path, open and locked descriptor) of a new file in `folder`, or of a new folder there and the lock file inside it."""
    while True:
        path = folder / f"{prefix}{secrets.token_hex(4)}"
        held = path if is_file else path / LOCK
        if not is_file:
            os.mkdir(path, 0o700)
        try:
            descriptor = os.open(held, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            if not folder.is_dir():
                raise
            continue  # another process has taken the empty folder for a leftover
        except OSError:
            clear(path)
            raise
        lock(descriptor, wait=True)
        if held.exists() and os.path.samestat(os.stat(held), os.fstat(descriptor)):
            return path, descriptor
        os.close(descriptor)  # as before, between opening and locking


def leftovers(folder: Path, prefix: str) -> Iterator[Path]:
    """Temporaries in `folder` whose names begin with `prefix` and that no living process holds, each locked while it is
    looked at, so that no two runs clear the same one."""
    try:
        found = [
            Path(entry)
            for entry in os.scandir(folder)
            if entry.name.startswith(prefix) and MARK in entry.name
        ]
        found = [
            path
            for path in sorted(found)
            if path.lstat().st_uid == _user() and not path.is_symlink()
        ]
    except OSError:
        return
    for path in found:
        try:
            held = path / LOCK if path.is_dir() else path
            descriptor = os.open(held, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                os.rmdir(
                    path
                )  # killed before it was locked; one that is being made is not empty, or is made anew
            continue
        except OSError:
            continue
        try:
            if lock(descriptor, wait=False):
                yield path
        finally:
            os.close(descriptor)


def lock(descriptor: int, *, wait: bool) -> bool:
    """Whether this process now holds the lock; False too where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def clear(path: Path) -> None:
    """Remove a temporary; what cannot be removed stays for a later run."""
    if path.is_dir() and not path.is_symlink():
        for entry in path.iterdir():
            if (
                entry.name != LOCK
            ):  # goes last: a folder without one is touched only where it is empty
                shutil.rmtree(
                    entry, ignore_errors=True
                ) if entry.is_dir() and not entry.is_symlink() else clear(entry)
        clear(path / LOCK)
        with contextlib.suppress(OSError):
            path.rmdir()
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def write_errors(path: str | Path, *places: Path) -> Iterator[None]:
    """Inside the block, what a full disk or a place that is not ours makes libraries raise becomes WriteError.

    A full disk always; other failures of the system only where they name one of `places`, or something below it. The
    block may also read files, and those errors are not about the output.
    """
    try:
        yield
    except Exception as error:
        number, named = system_error(error)
        if isinstance(error, HippError) and number not in (*FULL, errno.EROFS):
            raise
        below = named is not None and any(Path(named).is_relative_to(place) for place in places)
        if number in (*FULL, errno.EROFS) or (number is not None and below):
            remedy = _REMEDY.get(number, "Choose another place")
            failed = WriteError(
                f"{path} could not be written: {os.strerror(number)}. {remedy}, and run it again."
            )
            failed.errno = (
                number  # for the folder around it: its name is the one that the user knows
            )
            raise failed from error
        raise


def system_error(error: BaseException | None) -> tuple[int | None, str | None]:
    """(errno, file) of the system's error behind `error`; Rust libraries (safetensors, tokenizers) only write it out."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, OSError) and error.errno is not None:
            name = error.filename2 or error.filename
            return error.errno, os.fsdecode(name) if isinstance(
                name, str | bytes | os.PathLike
            ) else None
        rust = type(error).__module__ != "builtins" or type(error) is Exception
        if rust and (told := re.search(r"\(os error (\d+)\)", str(error))):
            return int(told[1]), None
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None, None
