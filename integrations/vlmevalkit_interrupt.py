"""Ctrl-C while the command `vlmeval` starts. Nothing slow is imported here."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

INTERRUPTED = 130
MESSAGE = (
    b"\nvlmeval: interrupted. Earlier answers are kept: run the same command again to continue.\n"
)


@contextlib.contextmanager
def prompt_interrupt() -> Iterator[None]:
    """Let ctrl-C end the process at once in a block that imports, with one line and exit code 130.

    A KeyboardInterrupt is not enough: torch and VLMEvalKit import their parts within `except:`
    clauses that catch it or turn it into an ImportError. Nothing is lost, because the evaluation
    has not started.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is None
    ):
        yield
        return

    def end(*_: Any) -> None:
        os.write(2, MESSAGE)
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
