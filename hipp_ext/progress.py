"""Progress of long measurements: a bar on a terminal, a line every half minute elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Tick = Callable[[int, int], None]
FIRST, EVERY = 15.0, 30.0  # seconds until the first line without a terminal, and between lines


@contextlib.contextmanager
def counting(show: bool, what: str) -> Iterator[Tick]:
    """Yield `tick(done, total)`, to be called after every group; it reports on stderr.

    Args:
        show: False: nothing is shown.
        what: name of the measurement.
    """
    if not show:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"{what}, group", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _lines(what)


def _lines(what: str) -> Tick:
    start = time.monotonic()
    due = start + FIRST

    def tick(done: int, total: int) -> None:
        nonlocal due
        now = time.monotonic()
        if now >= due and done < total:
            left = (now - start) / done * (total - done)
            print(
                f"hipp: {what}: group {done} of {total}, about {max(1, round(left / 60))} min left",
                file=sys.stderr,
                flush=True,
            )
            due = now + EVERY

    return tick
