"""Progress bars of long work; measurements report by lines where there is no terminal."""

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
    """Yield update(done, note), which moves a progress bar if `show`."""
    with _bar(disable=not show) as bar:
        task = bar.add_task(description, total=total, completed=start)
        yield lambda done, note: bar.update(
            task, completed=done, description=f"{description}, {note}" if note else description
        )


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


def _lines(what: str) -> Tick:
    start = time.monotonic()
    due = start + FIRST

    def tick(done: int, total: int) -> None:
        nonlocal due
        now = time.monotonic()
        if now >= due and done < total:
            left = (now - start) / done * (total - done)
            print(
                f"hipp: {what} {done} of {total}, about {max(1, round(left / 60))} min left",
                file=sys.stderr,
                flush=True,
            )
            due = now + EVERY

    return tick
