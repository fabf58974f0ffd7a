"""Progress of long work on stderr: bars in a terminal, and a line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Tick = Callable[[int, int], None]
FIRST, EVERY = 15.0, 30.0  # seconds until the first line without a terminal, and between lines


@contextlib.contextmanager
def counting(show: bool, what: str) -> Iterator[Tick]:
    """Yield `tick(done, total)`, to be called after each of them; it reports on stderr.

    Args:
        show: False: nothing is shown.
        what: name of the measurement, and what is counted: "measuring sensitivity, group".
    """
    if not show:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        from rich.console import Console

        with _bar(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _lines(what)


@contextlib.contextmanager
def progress_bar(
    show: bool, description: str, total: int, start: int = 0
) -> Iterator[Callable[[int, str], None]]:
    """Yield update(done, note), which reports on stderr if `show`.

    Args:
        show: False: nothing is shown.
        description: name of the work.
        total: number of its steps.
        start: how many were done before, by a run that goes on.
    """
    if not show:
        yield lambda done, note: None
    elif sys.stderr.isatty():
        from rich.console import Console

        with _bar(console=Console(stderr=True)) as bar:
            task = bar.add_task(description, total=total, completed=start)
            yield lambda done, note: bar.update(
                task, completed=done, description=f"{description}, {note}" if note else description
            )
    else:
        tick = _lines(description, start)
        yield lambda done, note: tick(done, total, note)


def _bar(**options: Any) -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        **options,
    )


def _lines(what: str, start: int | None = None) -> Callable[..., None]:
    """A `tick` that writes a line to stderr every EVERY seconds, with the time that is left.

    `start` is how many were done before; None: all but one of those that the first tick tells.
    """
    begun = time.monotonic()
    due = begun + FIRST

    def tick(done: int, total: int, note: str = "") -> None:
        nonlocal due, start
        start = done - 1 if start is None else start
        now = time.monotonic()
        if now >= due and start < done < total:
            left = (now - begun) / (done - start) * (total - done)
            print(
                f"hipp: {what} {done} of {total}, about {max(1, round(left / 60))} min left"
                + (f"; {note}" if note else ""),
                file=sys.stderr,
                flush=True,
            )
            due = now + EVERY

    return tick
