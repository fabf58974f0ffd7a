"""Temporary files and folders of writes in progress: their place, owner, and removal.

A write to NAME first creates a temporary `.NAME.hipp-XXXX` beside it, and holds a lock on it while
its process lives. The lock ends with the process, so an unlocked temporary is a leftover of a
killed run. Without locks in the file system nothing is known, and nothing is removed.
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
_MAX_NAME = 120  # bytes of an output's name in a temporary name; file systems allow 255


def target_of(path: str | Path) -> Path:
    """The place that a write to `path` goes to: all links are followed, also dangling ones.

    Raises:
        WriteError: `path` is invalid, or its links form a circle.
    """
    try:
        target = Path(os.path.realpath(path))
        os.lstat(target)
    except FileNotFoundError:
        return target
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WriteError(f"{str(path)!r} cannot be written: {reason}.") from None
    if target.is_symlink():
        raise WriteError(f"{path} is a link that leads to itself. Choose another place.")
    return target


def may_write(folder: Path) -> bool:
    """Whether this process may create and remove entries in `folder`."""
    effective = os.access in os.supports_effective_ids
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=effective)


def may_replace(path: Path) -> bool:
    """Whether this process may replace `path`, an existing entry of a folder."""
    if not may_write(path.parent):
        return False
    parent = path.parent.stat()
    owners = (0, parent.st_uid, path.lstat().st_uid)
    # In sticky folders such as /tmp, users may replace only what is their own.
    return not parent.st_mode & stat.S_ISVTX or _user() in owners


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def is_mount(path: Path) -> bool:
    """Whether something is mounted on `path`, including folders of the same disk (bind mounts)."""
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
    """The start of the names of the temporaries of an output called `name`."""
    if len(os.fsencode(name)) > _MAX_NAME:
        name = name[: _MAX_NAME // 4] + hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f".{name}{MARK}"


def make_temporary(folder: Path, prefix: str, *, is_file: bool) -> tuple[Path, int]:
    """(path, descriptor) of a new file in `folder`, or of a new folder and its lock file.

    The descriptor is open and locked.
    """
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
            continue  # another process has removed the empty folder as a leftover
        except OSError:
            clear(path)
            raise
        lock(descriptor, wait=True)
        if held.exists() and os.path.samestat(os.stat(held), os.fstat(descriptor)):
            return path, descriptor
        os.close(descriptor)  # removed between opening and locking


def leftovers(folder: Path, prefix: str) -> Iterator[Path]:
    """Temporaries in `folder` with this prefix that no living process holds.

    Each is locked while it is in use, so that no two runs clear the same one.
    """
    try:
        names = [e.name for e in os.scandir(folder) if e.name.startswith(prefix) and MARK in e.name]
        found = [folder / name for name in sorted(names)]
        found = [p for p in found if p.lstat().st_uid == _user() and not p.is_symlink()]
    except OSError:
        return
    for path in found:
        try:
            held = path / LOCK if path.is_dir() else path
            descriptor = os.open(held, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError:
            # Killed before it was locked. A living process' folder has a lock or is made again.
            with contextlib.suppress(OSError):
                os.rmdir(path)
            continue
        except OSError:
            continue
        try:
            if lock(descriptor, wait=False):
                yield path
        finally:
            os.close(descriptor)


def lock(descriptor: int, *, wait: bool) -> bool | None:
    """True: this process now holds the lock; False: another one does; None: there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def clear(path: Path) -> None:
    """Remove a temporary; what cannot be removed stays for a later run."""
    if not path.is_dir() or path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
        return
    for entry in path.iterdir():
        if entry.name == LOCK:  # last: a folder without a lock is only touched if it is empty
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            clear(entry)
    clear(path / LOCK)
    with contextlib.suppress(OSError):
        path.rmdir()


@contextlib.contextmanager
def write_errors(path: str | Path, *places: Path) -> Iterator[None]:
    """In the block, errors of a full or forbidden disk become WriteError.

    A full disk always; other errors of the system only if they name one of `places` or something
    below it, because the block may also read files, and those errors are not about the output.
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
            failed.errno = number  # for an enclosing block, whose path is the one the user knows
            raise failed from error
        raise


def system_error(error: BaseException | None) -> tuple[int | None, str | None]:
    """(errno, file) of the system error behind `error`, also of Rust libraries.

    Those (safetensors, tokenizers) give the number only in the text of the error.
    """
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, OSError) and error.errno is not None:
            name = error.filename2 or error.filename
            known = isinstance(name, str | bytes | os.PathLike)
            return error.errno, os.fsdecode(name) if known else None
        rust = type(error).__module__ != "builtins" or type(error) is Exception
        if rust and (told := re.search(r"\(os error (\d+)\)", str(error))):
            return int(told[1]), None
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None, None
