"""Replaces one folder by another; a kill at any moment loses neither.

The own folder of a swap holds `lock`; `new`, which is being built; `old`, which it replaces; and,
if files are moved one by one, a file that names the step that was begun. After the process has
died, a later run can see from these what is left to do.
"""

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from hipp_ext.errors import OutputExistsError, WriteError
from hipp_ext.files.temporaries import MARK, clear, leftovers, lock, make_temporary, prefix_of

NEW, OLD, GONE = "new", "old", "gone"
RETIRING, MOVING = "retiring", "moving"  # steps of a swap inside the folder
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
_LAST = ("config.json",)  # readers look for it first: it is removed first, and put back last


class Swap:
    """A folder that is built at `new` and moved to `target` by `commit`; otherwise it is removed.

    Args:
        path: name of the folder in messages.
        target: its destination after following links; the parent exists.
        inside: keep the folder at `target`, and move the files into it.
    """

    def __init__(self, path: str | Path, target: Path, *, inside: bool):
        self.path, self.target, self.inside = path, target, inside
        parent, prefix = (target, MARK) if inside else (target.parent, prefix_of(target.name))
        self.own, self._descriptor = make_temporary(parent, prefix, is_file=False)
        self.new = self.own / NEW
        self._keep = False  # for the next run to complete
        try:
            self.new.mkdir()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "Swap":
        return self

    def __exit__(self, *error: object) -> None:
        if not self._keep:
            clear(self.own)
        os.close(self._descriptor)

    def commit(self, overwrite: bool) -> None:
        """Move the new folder to its destination.

        Raises:
            OutputExistsError: something appeared there, and `overwrite` is False.
        """
        if self.inside:
            with _alone(self.target):
                if not overwrite and not is_empty(self.target):
                    self._refuse()
                (self.own / RETIRING).touch()
                self._keep = True
                _complete_inside(self.own, self.target)
        elif self._place(overwrite):
            _retire(self.own)
        self._keep = False

    def _place(self, overwrite: bool) -> bool:
        """Rename to the destination; returns whether something was there.

        Other processes may write there at the same time.
        """
        _copy_mode(self.target, self.new)
        for attempt in range(100):
            try:
                os.rename(self.new, self.target)  # also over an empty folder
                return attempt > 0
            except OSError as error:
                if error.errno not in _TAKEN:
                    self._put_back()
                    raise
            if not overwrite:
                self._refuse()
            self._keep = True
            try:
                os.rename(self.target, self.own / (OLD if attempt == 0 else f"{GONE}{attempt}"))
            except FileNotFoundError:
                pass  # another process has just removed it
            except OSError:
                self._put_back()
                raise
        raise WriteError(
            f"{self.path} was written by other processes many times. The new folder is {self.new}."
        )

    def _put_back(self) -> None:
        with contextlib.suppress(OSError):
            os.rename(self.own / OLD, self.target)
        self._keep = (self.own / OLD).exists()

    def _refuse(self) -> None:
        place = self.target if self.inside else self.target.parent
        names = (place / f"{self.target.name}.new{number or ''}" for number in itertools.count())
        kept = next(name for name in names if not os.path.lexists(name))
        os.rename(self.new, kept)
        raise OutputExistsError(
            f"{self.path} was written by another process in the meantime, and was left as it is. "
            f"The finished result is {kept}."
        )


def repair(target: Path) -> None:
    """Complete or clear what killed writes to `target` left; living processes are not touched."""
    for own in leftovers(target.parent, prefix_of(target.name)):
        new, old = own / NEW, own / OLD
        with contextlib.suppress(OSError):
            if new.exists() and old.exists():  # killed between the two renames
                os.rename(new, target)
        # If both still exist, another process' work is at the destination: all three stay.
        if own.is_dir() and not (new.exists() and old.exists()):
            _retire(own)
            clear(own)
    if target.is_dir():
        for own in leftovers(target, MARK):
            with contextlib.suppress(OSError), _alone(target):
                _complete_inside(own, target)
                clear(own)


def is_empty(folder: Path) -> bool:
    """Whether `folder` is empty, apart from writes in progress and lost+found."""
    try:
        return not _entries(folder)
    except PermissionError:
        raise WriteError(
            f"{folder} is a folder that you may not read. Choose another place."
        ) from None


def _complete_inside(own: Path, target: Path) -> None:
    """Move the old files out and the new ones in, as far as that is begun and not done yet."""
    if (own / RETIRING).exists():
        (own / OLD).mkdir(exist_ok=True)
        for name in reversed(_ordered(_entries(target))):
            os.rename(target / name, own / OLD / name)
        os.rename(own / RETIRING, own / MOVING)
    if (own / MOVING).exists():
        for name in _ordered(os.listdir(own / NEW)):
            os.rename(own / NEW / name, target / name)
        os.rename(own / MOVING, own / GONE)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """In the block no other process moves files into `folder`, if the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def _entries(folder: Path) -> list[str]:
    return [
        name for name in os.listdir(folder) if not name.startswith(MARK) and name != "lost+found"
    ]


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name in _LAST, name.endswith(".json"), name))


def _retire(own: Path) -> None:
    """Rename `old`: it is removed file by file, and an incomplete rest must not be put back."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(own / OLD, own / GONE)


def _copy_mode(target: Path, new: Path) -> None:
    """Give `new` the owner and permissions of an existing folder at `target`."""
    with contextlib.suppress(OSError):
        old = target.stat()
        if stat.S_ISDIR(old.st_mode):
            os.chown(new, old.st_uid, old.st_gid)
            os.chmod(new, stat.S_IMODE(old.st_mode))
