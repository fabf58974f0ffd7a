"""What a reader is to the fuzzer. Nothing heavy is imported here: the list of names must be quick
to have.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def _anything(result: Any, folder: Path) -> None:
    """No check: reading it is all that is asked."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How one kind of file from a user is made and read.

    Attributes:
        make: writes a valid folder, with the product's own writers where it has any.
        read: what is under test; called with a damaged copy of the folder.
        check: raises AssertionError where a result is not one that a damaged file may have.
        errors: names in hipp_ext.errors that `read` may raise.
        share: of the cases that are asked for; less than 1 for slow readers.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    check: Callable[[Any, Path], None] = _anything
    errors: tuple[str, ...] = ("DataError",)
    share: float = 1.0


@dataclass
class Table:
    """Readers by name, filled by the decorator `reads`."""

    readers: dict[str, Reader] = field(default_factory=dict)

    def reads(self, name: str, make: Callable[[Path], None], **options: Any) -> Callable:
        """Put the decorated function into the table as the `read` of a reader."""

        def add(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
            self.readers[name] = Reader(make=make, read=read, **options)
            return read

        return add


TABLE = Table()


def all_readers() -> dict[str, Reader]:
    """The whole table."""
    # They fill the table, and so does fuzz.readers, which they import.
    import fuzz.benchmark_readers
    import fuzz.calibration_readers
    import fuzz.data_readers  # noqa: F401

    return TABLE.readers
