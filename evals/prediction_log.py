"""A log of answers, from which a killed run continues and ends with the same answers as an
uninterrupted one.

The questions of a batch share their padding, which changes the last bits of the logits and
sometimes an answer. Therefore a batch counts only as a whole: an incomplete one, which a killed
process leaves, is dropped and asked again.

One process at a time writes a log. Its lock belongs to the operating system, which releases it when
the process dies. If there are no locks, as on some network drives, every process writes its own
file, and the files are merged at the end.
"""

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from hipp_ext.errors import DataError, OutputBusyError, WriteError
from hipp_ext.files import write_atomic
from hipp_ext.files.temporaries import lock
from hipp_ext.files.untrusted import read_plain

LOCK, PART = ".lock", ".part"
_MAX_BYTES = 1 << 30  # size of a file of lines; POPE's answers need half a megabyte
_START_OVER = "Delete the file to start over"
Line = TypeVar("Line")


@dataclass
class _Answer:
    index: str | int
    prediction: str
    batch: int = 1  # number of questions asked together; their lines follow each other


class PredictionLog:
    """Answers by row index, in a JSONL file to which lines are appended.

    Attributes:
        answers: answer by row index (as text), read from the file.

    Args:
        path: path of the file.
        private: write to a file of this process beside it, until `merge` is called.

    Raises:
        DataError: a line before the last one is damaged.
        WriteError: the folder cannot be created.
    """

    def __init__(self, path: str | Path, private: bool = False):
        self.path = Path(path)
        self._private = private
        self._file = (
            self.path.with_name(f"{self.path.stem}.{uuid.uuid4().hex}{PART}")
            if private
            else self.path
        )
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._batches, whole = _read_batches(self.path)
        self.answers = {index: answer for batch in self._batches for index, answer in batch.items()}
        for part in self._parts():
            self._take(_read_batches(part)[0])
        if not private and self.path.exists() and whole < self.path.stat().st_size:
            with writing(self.path):
                os.truncate(self.path, whole)  # or the next line would continue an incomplete one

    def add(self, answers: Iterable[tuple[str, str]]) -> None:
        """Append the (index, answer) pairs of one batch.

        Raises:
            WriteError: the file cannot be written, for example because the disk is full. Earlier
                batches are kept; an incomplete one is dropped when the file is read.
        """
        new = dict(answers)
        if not new:
            return
        try:
            with self._file.open("ab") as file:
                file.write(_lines(new))
        except OSError as error:
            raise WriteError(
                f"{self.path}: answers could not be written: {error.strerror}. Earlier answers "
                "are kept: free some space and run the same command again to continue"
            ) from error
        self._batches.append(new)
        self.answers |= new

    def merge(self, order: Sequence[str]) -> None:
        """Move the batches of private files into the one file, in the order of the indices `order`.

        The private files are removed. A process that still runs loses nothing, because its answers
        are in memory.
        """
        parts = self._parts()
        if not (self._private or parts):
            return
        for part in parts:
            self._take(_read_batches(part)[0])
        there = _read_batches(self.path)[0]
        self._take(there)
        if there != self._batches:
            rank = {index: place for place, index in enumerate(order)}
            self._batches.sort(key=lambda batch: rank.get(next(iter(batch)), len(rank)))
            with writing(self.path):
                write_atomic(self.path, b"".join(map(_lines, self._batches)))
        for part in parts:
            part.unlink(missing_ok=True)

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.*{PART}"))

    def _take(self, batches: Iterable[dict[str, str]]) -> None:
        for batch in batches:
            if self.answers.keys().isdisjoint(batch):
                self._batches.append(batch)
                self.answers |= batch


@contextlib.contextmanager
def open_log(path: str | Path, order: Sequence[str]) -> Iterator[PredictionLog]:
    """Open the log at `path` and lock its folder for this process while the block runs.

    Args:
        path: path of the file.
        order: indices of all questions, in order.

    Raises:
        OutputBusyError: another process holds the lock.
        DataError, WriteError: see `PredictionLog`.
    """
    path = Path(path)
    with claim(path.parent) as alone:
        log = PredictionLog(path, private=not alone)
        try:
            yield log
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the important one
                log.merge(order)
            raise
        log.merge(order)


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Lock `folder` for this process while the block runs; yields False if the file system has no
    locks.

    Raises:
        OutputBusyError: another process holds the lock; the message names it.
        WriteError: the folder cannot be created or written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock(folder / LOCK)
    try:
        yield file is not None
    finally:
        with contextlib.suppress(OSError):
            # The lock is still held, so this is not the file of another process.
            (folder / LOCK).unlink(missing_ok=True)
        if file is not None:
            file.close()


def _lock(path: Path) -> IO[str] | None:
    while True:
        file = path.open("a+", encoding="utf-8")
        if (held := lock(file.fileno(), wait=False)) is False:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            file.close()
            raise OutputBusyError(
                f"{path.parent} is being written by {holder}. Wait until it has ended or stop it, "
                "then run the same command again to continue. With another work folder both can "
                "run at the same time"
            )
        if held and is_same(file, path):
            break
        file.close()
        if held is None:  # the file system has no locks
            return None
    with contextlib.suppress(OSError):  # the lock is held even if the disk is full
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return file


def is_same(file: IO, path: Path) -> bool:
    """Whether an open file is still the one at `path`: its holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into a WriteError that names `path`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error


def read_lines(file: Path, kind: type[Line], fields: str, hint: str = "") -> list[tuple[Line, int]]:
    """The objects of a file of JSON lines, each with the offset of its end. An incomplete last line
    is left out.

    Args:
        file: path of the file.
        kind: dataclass of the objects. Types are checked; unknown fields are ignored.
        fields: names of the fields, for the error message.
        hint: end of the error message.

    Raises:
        DataError: the file does not exist, or one of its lines is damaged.
    """
    from pydantic import TypeAdapter, ValidationError

    read, found, end = TypeAdapter(kind).validate_json, [], 0
    for number, line in enumerate(read_plain(file, _MAX_BYTES).split(b"\n")[:-1], start=1):
        end += len(line) + 1
        try:
            found.append((read(line, strict=True), end))
        except ValidationError:
            raise DataError(
                f"{file}, line {number}, is damaged: an object with {fields} is needed{hint}"
            ) from None
    return found


def _read_batches(file: Path) -> tuple[list[dict[str, str]], int]:
    """The complete batches of a log and the offset of their end; none without a file."""
    try:
        lines = read_lines(file, _Answer, "index, prediction", f". {_START_OVER}")
    except DataError:
        if os.path.lexists(file):
            raise
        return [], 0  # also a private file that another process has just merged
    batches, place = [], 0
    while place < len(lines):
        size = lines[place][0].batch
        group = [line for line, _ in lines[place : place + max(size, 1)]]
        if size < 1 or any(line.batch != size for line in group):
            raise DataError(
                f"{file}, line {place + 1}, is damaged: it does not belong to a batch of {size}. "
                f"{_START_OVER}"
            )
        if len(group) < size:
            break  # the rest was not written
        batches.append({str(line.index): line.prediction for line in group})
        place += size
    return batches, lines[place - 1][1] if place else 0


def _lines(batch: dict[str, str]) -> bytes:
    lines: list[dict[str, Any]] = [
        {"index": i, "prediction": answer, "batch": len(batch)} for i, answer in batch.items()
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()
